//! LoRA files of every layout, and what is refused.

use std::fs;
use std::path::PathBuf;

use super::*;

/// A safetensors file of f32 tensors that are all ones, and of numbers that are called alphas.
fn write(folder: &Path, name: &str, tensors: &[(&str, &[usize])], metadata: &str) -> PathBuf {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (key, shape) in tensors {
        let start = data.len();
        let value: f32 = if key.ends_with("alpha") { 3.0 } else { 1.0 };
        for _ in 0..shape.iter().product() {
            data.extend(value.to_le_bytes());
        }
        let offsets = [start, data.len()];
        let entry = serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": offsets});
        header.insert((*key).to_owned(), entry);
    }
    if !metadata.is_empty() {
        let metadata = serde_json::json!({ "lora_adapter_metadata": metadata });
        header.insert("__metadata__".to_owned(), metadata);
    }
    let header = serde_json::Value::from(header).to_string().into_bytes();
    let bytes = [&(header.len() as u64).to_le_bytes(), &*header, &*data].concat();
    let path = folder.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

const ATTENTION: &str = "down_blocks.0.attentions.0.transformer_blocks.0.attn1";
const TEXT: &str = "text_model.encoder.layers.0.self_attn";

/// A model of few weights.
fn checkpoints(folder: &Path) -> Vec<(Component, Checkpoint)> {
    let read = |name: &str, tensors: &[(&str, &[usize])]| {
        Checkpoint::read(&write(folder, name, tensors, ""), Format::Safetensors).unwrap()
    };
    let unet = [
        (&*format!("{ATTENTION}.to_q.weight"), &[6, 4][..]),
        (&*format!("{ATTENTION}.to_out.0.weight"), &[4, 6]),
        ("conv_in.weight", &[5, 4, 3, 3]),
        ("conv_in.bias", &[5]),
        ("time_embedding.linear_1.weight", &[8, 2]),
    ];
    let text = [
        (&*format!("{TEXT}.q_proj.weight"), &[4, 4][..]),
        (&*format!("{TEXT}.out_proj.weight"), &[4, 4]),
    ];
    vec![
        (Component::TextEncoder, read("text.safetensors", &text)),
        (Component::Unet, read("unet.safetensors", &unet)),
    ]
}

/// What a file changes: names and scales; or the error.
fn found(name: &str, tensors: &[(&str, &[usize])], metadata: &str) -> (String, Unmatched) {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), name, tensors, metadata);
    let (mut changes, none) = (ComponentChanges::default(), Unmatched::default());
    match changes.add(&LoraFile { path, scale: 0.5 }, &checkpoints(folder.path())) {
        Ok(unmatched) => {
            let changes = changes.0.values().flatten();
            let changes = changes.map(|(name, changes)| {
                let scales = changes.iter().map(|change| change.scale.to_string());
                format!("{name} {}", scales.collect::<Vec<_>>().join("+"))
            });
            (changes.collect::<Vec<_>>().join(", "), unmatched)
        }
        Err(error) => (error.to_string(), none),
    }
}

#[test]
fn a_weight_is_found_under_all_of_its_names() {
    let q = format!("{ATTENTION}.to_q.weight 0.5");
    let (out, text) =
        (format!("{ATTENTION}.to_out.0.weight 0.5"), format!("{TEXT}.q_proj.weight 0.5"));
    let check = |down: &str, up: &str, shapes: [&[usize]; 2], expected: &str| {
        let (changes, unmatched) =
            found("x.safetensors", &[(down, shapes[0]), (up, shapes[1])], "");
        assert_eq!(changes, expected, "{down}");
        assert_eq!((unmatched.count, unmatched.of), (0, 1), "{down}");
    };
    for (stem, shapes, expected) in [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", [2, 4, 6, 2], &q),
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
            [2, 6, 4, 2],
            &out,
        ),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", [2, 4, 4, 2], &text),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", [2, 4, 4, 2], &text),
    ] {
        let [a, b, c, d] = shapes;
        let keys = ["down", "up"].map(|part| format!("{stem}.lora_{part}.weight"));
        check(&keys[0], &keys[1], [&[a, b], &[c, d]], expected);
    }
    for prefix in ["unet.", "", "base_model.model.", "base_model.model.unet."] {
        for (end, names) in [
            (".to_q", [".lora_A.weight", ".lora_B.weight"]),
            (".to_q", [".lora_A.default.weight", ".lora_B.default.weight"]),
            (".to_q", [".lora.down.weight", ".lora.up.weight"]),
            (".processor.to_q", ["_lora.down.weight", "_lora.up.weight"]),
        ] {
            let keys = names.map(|name| format!("{prefix}{ATTENTION}{end}{name}"));
            check(&keys[0], &keys[1], [&[2, 4], &[6, 2]], &q);
        }
        let keys = ["down", "up"]
            .map(|part| format!("{prefix}{ATTENTION}.processor.to_out_lora.{part}.weight"));
        check(&keys[0], &keys[1], [&[2, 6], &[4, 2]], &out);
    }
    for stem in [
        format!("text_encoder.{TEXT}.q_proj.lora_linear_layer"),
        format!("text_encoder.{TEXT}.to_q_lora"),
        format!("text_encoder.{}.q_proj.lora", TEXT.trim_start_matches("text_model.")),
        format!("base_model.model.{TEXT}.q_proj.lora"),
    ] {
        let keys = ["down", "up"].map(|part| format!("{stem}.{part}.weight"));
        check(&keys[0], &keys[1], [&[2, 4], &[4, 2]], &text);
    }
    // A convolution, and one of three factors.
    check(
        "conv_in.lora_A.weight",
        "conv_in.lora_B.weight",
        [&[2, 4, 3, 3], &[5, 2, 1, 1]],
        "conv_in.weight 0.5",
    );
    let three: [(&str, &[usize]); 3] = [
        ("lora_unet_conv_in.lora_down.weight", &[2, 4, 1, 1]),
        ("lora_unet_conv_in.lora_mid.weight", &[3, 2, 3, 3]),
        ("lora_unet_conv_in.lora_up.weight", &[5, 3, 1, 1]),
    ];
    assert_eq!(found("x.safetensors", &three, "").0, "conv_in.weight 0.5");
}

#[test]
fn alphas_stand_in_tensors_or_in_what_stands_beside_them() {
    let key = |end: &str| format!("time_embedding.linear_1.{end}");
    let (down, up) = (key("lora_A.weight"), key("lora_B.weight"));
    let tensors: [(&str, &[usize]); 2] = [(&down, &[2, 2]), (&up, &[8, 2])];
    let check = |metadata: &str, expected: &str| {
        let (found, _) = found("x.safetensors", &tensors, metadata);
        assert!(found.contains(expected), "{metadata}: {found}");
    };
    check("", "linear_1.weight 0.5");
    check("{\"unet.lora_alpha\": 8, \"text_encoder.lora_alpha\": 16}", "weight 2");
    check("{\"unet.lora_alpha\": 8, \"unet.use_rslora\": true}", "weight 2.82842712474");
    check("{\"unet.use_dora\": true}", "its lora_adapter_metadata: unet.use_dora is not covered");
    check("{\"unet.alpha_pattern\": {\"a\": 1}}", "alpha_pattern is not covered");
    check("{", "its lora_adapter_metadata: EOF");
    let alpha = key("alpha");
    let with_alpha: [(&str, &[usize]); 3] = [tensors[0], tensors[1], (&alpha, &[])];
    // A tensor's own wins: 0.5 · 3 / 2.
    let (changes, _) = found("x.safetensors", &with_alpha, "{\"unet.lora_alpha\": 8}");
    assert_eq!(changes, "time_embedding.linear_1.weight 0.75");
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), "adapter_model.safetensors", &tensors, "");
    fs::write(folder.path().join("adapter_config.json"), "{\"lora_alpha\": 1}").unwrap();
    let mut changes = ComponentChanges::default();
    let weights = checkpoints(folder.path());
    changes.add(&LoraFile { path, scale: 1.0 }, &weights).unwrap();
    let of_unet = changes.of(Component::Unet).unwrap();
    assert_eq!(of_unet["time_embedding.linear_1.weight"][0].scale, 0.5);
    assert_eq!(changes.factors(Component::Unet).count(), 2);
}

#[test]
fn what_does_not_fit_is_counted_and_named_with_its_numbers() {
    let check = |tensors: &[(&str, &[usize])], expected: &str| {
        let (_, unmatched) = found("x.safetensors", tensors, "");
        assert_eq!((unmatched.count, unmatched.of), (1, 2), "{expected}");
        assert_eq!(unmatched.first.as_deref(), Some(expected));
    };
    let fits =
        [("conv_in.lora_A.weight", &[1, 4, 3, 3][..]), ("conv_in.lora_B.weight", &[5, 1, 1, 1])];
    let (down, up) =
        ("time_embedding.linear_1.lora_A.weight", "time_embedding.linear_1.lora_B.weight");
    for (down_dims, up_dims) in [
        (&[2, 3][..], &[8, 2][..]),
        (&[2, 2], &[7, 2]),
        (&[2, 2], &[8, 3]),
        (&[0, 2], &[8, 0]),
        (&[2], &[8]),
        (&[], &[8, 2]),
    ] {
        let expected =
            format!("{down}: down {down_dims:?} and up {up_dims:?} do not fit the weight [8, 2]");
        check(&[fits[0], fits[1], (down, down_dims), (up, up_dims)], &expected);
    }
    let other = [
        ("unet.mid_block.x.lora_A.weight", &[2, 2][..]),
        ("unet.mid_block.x.lora_B.weight", &[2, 2]),
    ];
    check(&[fits[0], fits[1], other[0], other[1]], "unet.mid_block.x.lora_A.weight");
    // A bias is no weight to be changed.
    let bias =
        [("conv_in.bias.lora_A.weight", &[1, 1][..]), ("conv_in.bias.lora_B.weight", &[5, 1])];
    check(&[fits[0], fits[1], bias[0], bias[1]], "conv_in.bias.lora_A.weight");
}

#[test]
fn what_is_no_lora_is_one_line_that_names_the_file_and_the_key() {
    let down = ("conv_in.lora_A.weight", &[1, 4, 3, 3][..]);
    for (tensors, expected) in [
        (&[("conv_in.dora_scale", &[5, 1, 1, 1][..])][..], "\"conv_in.dora_scale\" is no part of"),
        (&[("conv_in.hada_w1_a", &[5, 2])], "\"conv_in.hada_w1_a\" is no part of a LoRA"),
        (&[("conv_in.weight", &[5, 4, 3, 3])], "DoRA, LoHa, LoKr or whole weights"),
        (&[down], "conv_in.lora_A.weight: of down and up one is missing"),
        (&[down, ("conv_in.lora_down.weight", &[1])], "it is there in two layouts"),
        (&[], "there is nothing in it"),
    ] {
        let (error, _) = found("x.safetensors", tensors, "");
        assert!(error.contains(expected) && !error.contains('\n'), "{error}");
        assert_eq!(error.matches("x.safetensors: ").count(), 1, "{error}");
    }
}
