//! Numbers for tests: a seeded generator, tensors of every layout, and comparison.

use candle_core::DType;
use tiny_sd::Result;
use tiny_sd::backend::Backend;
use tiny_sd::tensor::Tensor;

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    /// Numbers in −1..1.
    pub fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }
}

/// How a tensor lies in its storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    Contiguous,
    /// Rows and columns around it belong to a larger tensor.
    Offset,
    /// The last dimension slowest.
    LastFirst,
    /// The second dimension fastest, as images are stored.
    ChannelsLast,
    /// The first dimension repeats one entry.
    Broadcast,
    /// The last dimension is every element of a wider one in steps.
    Strided,
}

pub const LIES: [Lie; 6] =
    [Lie::Contiguous, Lie::Offset, Lie::LastFirst, Lie::ChannelsLast, Lie::Broadcast, Lie::Strided];

/// A random tensor of `dims` that lies so.
pub fn tensor<B: Backend>(
    random: &mut Random,
    dims: &[usize],
    lie: Lie,
    dtype: DType,
    device: &B::Device,
) -> Result<Tensor<B>> {
    let mut make = |dims: &[usize]| -> Result<Tensor<B>> {
        let values = random.values(dims.iter().product());
        Tensor::from_slice(&values, dims, device)?.to_dtype(dtype)
    };
    let rank = dims.len();
    // The order in which dimensions are stored, and its inverse.
    let stored_in = |order: Vec<usize>, make: &mut dyn FnMut(&[usize]) -> Result<Tensor<B>>| {
        let stored: Vec<usize> = order.iter().map(|&d| dims[d]).collect();
        let mut back = vec![0; rank];
        order.iter().enumerate().for_each(|(place, &d)| back[d] = place);
        make(&stored)?.permute(&back)
    };
    match lie {
        Lie::Contiguous => make(dims),
        Lie::Offset => {
            let larger: Vec<usize> = dims.iter().map(|d| d + 3).collect();
            let mut view = make(&larger)?;
            for (d, &size) in dims.iter().enumerate() {
                view = view.narrow(d, 1 + d % 2, size)?;
            }
            Ok(view)
        }
        Lie::LastFirst => {
            let mut order: Vec<usize> = (0..rank).collect();
            order.rotate_right(1);
            stored_in(order, &mut make)
        }
        Lie::ChannelsLast => {
            let mut order: Vec<usize> = (0..rank).collect();
            if rank > 2 {
                order[1..].rotate_left(1);
            }
            stored_in(order, &mut make)
        }
        Lie::Broadcast => {
            let mut one = dims.to_vec();
            one[0] = 1;
            make(&one)?.broadcast_as(dims)
        }
        Lie::Strided => {
            let mut wider = dims.to_vec();
            wider[rank - 1] *= 2;
            let view = make(&wider)?;
            let mut stride = view.layout().stride().to_vec();
            stride[rank - 1] = 2;
            view.as_strided(dims, &stride)
        }
    }
}

/// The elements as f32, in logical order.
pub fn values<B: Backend>(x: &Tensor<B>) -> Result<Vec<f32>> {
    x.to_dtype(DType::F32)?.to_vec()
}

/// The largest difference, relative to the largest value.
pub fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(1e-6f32, |largest, x| largest.max(x.abs()));
    let differences = found.iter().zip(expected).map(|(x, y)| (x - y).abs());
    // NaN must not be lost in a maximum.
    differences.fold(0.0, |worst, d| if d > worst || d.is_nan() { d } else { worst }) / largest
}
