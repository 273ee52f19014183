//! What a portrait shows, told from its pixels alone: colours by the medians of regions, the rest
//! by a small network that `scripts/demo-model/probe.py` trains. Separate because it knows nothing
//! of prompts.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use tiny_sd::image::Picture;

use crate::golden::fixtures;

/// Colours as `scripts/demo-model/portraits.py` has them.
type Palette = &'static [(&'static str, [u8; 3])];

pub const HAIR: Palette = &[
    ("black", [36, 32, 38]),
    ("brown", [118, 72, 40]),
    ("blonde", [242, 208, 104]),
    ("red", [204, 72, 30]),
    ("gray", [206, 208, 214]),
    ("pink", [240, 118, 182]),
    ("blue", [58, 104, 214]),
];
pub const SKINS: Palette = &[
    ("pale", [253, 226, 206]),
    ("tan", [230, 178, 132]),
    ("brown", [164, 108, 72]),
    ("dark", [108, 70, 50]),
];
pub const BACKGROUNDS: Palette = &[
    ("red", [212, 62, 60]),
    ("orange", [246, 150, 54]),
    ("yellow", [252, 222, 92]),
    ("green", [94, 184, 102]),
    ("blue", [86, 148, 234]),
    ("purple", [150, 100, 206]),
    ("pink", [250, 166, 200]),
    ("gray", [164, 168, 176]),
];
pub const SHIRTS: Palette = &[
    ("red", [206, 50, 54]),
    ("orange", [242, 138, 40]),
    ("yellow", [248, 214, 66]),
    ("green", [72, 168, 84]),
    ("blue", [62, 122, 222]),
    ("purple", [134, 82, 196]),
    ("pink", [246, 146, 188]),
    ("white", [246, 246, 248]),
    ("black", [46, 46, 54]),
];
pub const GLASSES: [&str; 3] = ["none", "glasses", "sunglasses"];
pub const HATS: [&str; 5] = ["none", "cap", "beanie", "crown", "top hat"];
pub const MOUTHS: [&str; 3] = ["smile", "neutral", "surprised"];
pub const PEOPLE: [&str; 2] = ["girl", "boy"];
pub const BEARDS: [&str; 2] = ["none", "beard"];

/// The side of a portrait in pixels.
const SIDE: usize = 128;

/// Columns and rows.
type Region = (Range<usize>, Range<usize>);

/// Both sides of the head, where no hair reaches on one of them at least.
const BESIDE: [Region; 2] = [(3..15, 6..58), (113..125, 6..58)];
/// Over the forehead, where there is hair if there is no hat.
const FRONT: [Region; 1] = [(54..74, 25..33)];
/// Below the collar.
const CHEST: [Region; 1] = [(52..76, 119..127)];
/// Beside and below the nose, above the mouth.
const CHEEKS: [Region; 2] = [(50..58, 73..77), (70..78, 73..77)];

/// By what is told of a picture: which it is, by its name.
pub type Shown = HashMap<&'static str, &'static str>;

/// The probe's weights: convolutions of 3x3 that halve the side, and a linear layer.
pub struct Measure {
    tensors: HashMap<String, Tensor>,
}

impl Measure {
    pub fn open() -> Self {
        let path = fixtures().join("demo/probe.safetensors");
        let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let wide = |(name, tensor): (String, Tensor)| (name, tensor.to_dtype(DType::F32).unwrap());
        Self { tensors: tensors.into_iter().map(wide).collect() }
    }

    fn probe(&self, rgb: &[u8]) -> candle_core::Result<Vec<f32>> {
        let get = |name: String| &self.tensors[&name];
        let mut x = Tensor::from_vec(quarters(rgb), (1, 3, SIDE / 4, SIDE / 4), &Device::Cpu)?;
        for layer in 0..3 {
            let bias = get(format!("{layer}.bias")).reshape((1, (), 1, 1))?;
            x = x
                .conv2d(get(format!("{layer}.weight")), 1, 2, 1, 1)?
                .broadcast_add(&bias)?
                .relu()?;
        }
        let out = x.flatten_all()?.unsqueeze(0)?.matmul(&get("out.weight".into()).t()?)?;
        out.squeeze(0)?.add(get("out.bias".into()))?.to_vec1()
    }

    pub fn of(&self, picture: &Picture) -> Shown {
        assert_eq!((picture.size().width, picture.size().height), (SIDE, SIDE));
        let rgb = picture.rgb();
        let mut shown = Shown::from([
            ("background", nearest(BACKGROUNDS, rgb, &BESIDE)),
            ("hair", nearest(HAIR, rgb, &FRONT)),
            ("shirt", nearest(SHIRTS, rgb, &CHEST)),
            ("skin", nearest(SKINS, rgb, &CHEEKS)),
        ]);
        let out = self.probe(rgb).unwrap();
        let heads: [(&str, &[&'static str]); 5] = [
            ("glasses", &GLASSES),
            ("hat", &HATS),
            ("mouth", &MOUTHS),
            ("person", &PEOPLE),
            ("beard", &BEARDS),
        ];
        let mut start = 0;
        for (name, values) in heads {
            let scores = &out[start..start + values.len()];
            let best = (0..values.len()).max_by(|a, b| scores[*a].total_cmp(&scores[*b]));
            shown.insert(name, values[best.unwrap()]);
            start += values.len();
        }
        assert_eq!(start, out.len());
        shown
    }
}

/// What the probe sees: means of 4x4 pixels in 0..1, (3, 32, 32).
fn quarters(rgb: &[u8]) -> Vec<f32> {
    const BLOCK: usize = 4;
    let blocks = SIDE / BLOCK;
    let mean = |channel: usize, y: usize, x: usize| {
        let rows = y * BLOCK..(y + 1) * BLOCK;
        let pixels = rows.flat_map(|y| (x * BLOCK..(x + 1) * BLOCK).map(move |x| (y, x)));
        let sum: f32 = pixels.map(|(y, x)| f32::from(rgb[3 * (y * SIDE + x) + channel])).sum();
        sum / (BLOCK * BLOCK) as f32 / 255.0
    };
    let places = (0..3).flat_map(|c| (0..blocks * blocks).map(move |i| (c, i)));
    places.map(|(channel, i)| mean(channel, i / blocks, i % blocks)).collect()
}

/// The colour of a palette that is nearest to the median of regions.
fn nearest(palette: Palette, rgb: &[u8], regions: &[Region]) -> &'static str {
    let median = |channel: usize| {
        let mut values = Vec::new();
        for (columns, rows) in regions {
            for y in rows.clone() {
                values.extend(columns.clone().map(|x| rgb[3 * (y * SIDE + x) + channel]));
            }
        }
        values.sort_unstable();
        i32::from(values[values.len() / 2])
    };
    let found = [0, 1, 2].map(median);
    let distance = |color: &[u8; 3]| -> i32 {
        color.iter().zip(found).map(|(a, b)| (i32::from(*a) - b).pow(2)).sum()
    };
    palette.iter().min_by_key(|(_, color)| distance(color)).unwrap().0
}
