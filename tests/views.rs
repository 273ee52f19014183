//! Views on every backend: the same chains of views on a tensor and on a naive model on the host.
//! Generic over the backend, so that each one can be held against it.

use tiny_sd::Result;
use tiny_sd::backend::{Backend, cpu};
use tiny_sd::tensor::Tensor;

use crate::numbers::Random;

/// A tensor as its shape and its elements in row-major order.
#[derive(Debug, Clone)]
struct Model {
    dims: Vec<usize>,
    values: Vec<u32>,
}

impl Model {
    /// Element by element: `source` says which index of this one an index of the result reads.
    fn view(&self, dims: Vec<usize>, source: impl Fn(&[usize]) -> Vec<usize>) -> Self {
        let values = (0..dims.iter().product())
            .map(|flat| {
                let place = source(&index(flat, &dims)).into_iter().zip(&self.dims);
                self.values[place.fold(0, |flat, (i, dim)| flat * dim + i)]
            })
            .collect();
        Self { dims, values }
    }
}

fn index(mut flat: usize, dims: &[usize]) -> Vec<usize> {
    let mut index = vec![0; dims.len()];
    for (i, dim) in index.iter_mut().zip(dims).rev() {
        (*i, flat) = (flat % dim, flat / dim);
    }
    index
}

/// One random view of both.
fn step<B: Backend>(
    random: &mut Random,
    x: &Tensor<B>,
    model: &Model,
) -> Result<(String, Tensor<B>, Model)> {
    let (dims, rank) = (model.dims.clone(), model.dims.len());
    let d = random.below(rank);
    match random.below(6) {
        0 => {
            let start = random.below(dims[d]);
            let len = 1 + random.below(dims[d] - start);
            let mut narrow = dims;
            narrow[d] = len;
            let view = model.view(narrow, |i| {
                let mut i = i.to_vec();
                i[d] += start;
                i
            });
            Ok((format!("narrow {d} {start} {len}"), x.narrow(d, start, len)?, view))
        }
        1 => {
            let e = random.below(rank);
            let swap = |i: &[usize]| {
                let mut i = i.to_vec();
                i.swap(d, e);
                i
            };
            Ok((format!("transpose {d} {e}"), x.transpose(d, e)?, model.view(swap(&dims), swap)))
        }
        2 if rank < 6 && model.values.len() < 500 => {
            let mut wide = dims.clone();
            if wide[d] == 1 {
                wide[d] = 3;
            }
            wide.insert(0, 2);
            let one = |i: &[usize]| i[1..].iter().zip(&dims).map(|(i, dim)| i % dim).collect();
            let view = model.view(wide.clone(), one);
            Ok((format!("broadcast {wide:?}"), x.broadcast_as(wide)?, view))
        }
        3 if rank > 1 => {
            // Two neighbours become one dimension, or one becomes two.
            let d = d.min(rank - 2);
            let mut joined = dims;
            joined[d] *= joined.remove(d + 1);
            let view = Model { dims: joined.clone(), values: model.values.clone() };
            Ok((format!("reshape {joined:?}"), x.reshape(joined)?, view))
        }
        4 if rank < 5 && dims[d] % 2 == 0 => {
            let mut split = dims;
            split[d] /= 2;
            split.insert(d + 1, 2);
            let view = Model { dims: split.clone(), values: model.values.clone() };
            Ok((format!("reshape {split:?}"), x.reshape(split)?, view))
        }
        2..=4 if rank < 6 => {
            let mut more = dims;
            more.insert(d, 1);
            let view = Model { dims: more, values: model.values.clone() };
            Ok((format!("unsqueeze {d}"), x.unsqueeze(d)?, view))
        }
        _ => Ok(("contiguous".into(), x.contiguous()?, model.clone())),
    }
}

/// Any chain of views reads the elements that the model reads.
pub fn chains_of_views_read_what_the_model_reads<B: Backend>(device: &B::Device) -> Result<()> {
    for seed in 0..150 {
        let mut random = Random(seed);
        let dims: Vec<usize> = (0..1 + random.below(4)).map(|_| 1 + random.below(5)).collect();
        let values: Vec<u32> = (0..dims.iter().product::<usize>() as u32).collect();
        let mut x: Tensor<B> = Tensor::from_slice(&values, dims.as_slice(), device)?;
        let mut model = Model { dims, values };
        let mut chain = vec![format!("{:?}", model.dims)];
        for _ in 0..8 {
            let (name, view, viewed) = step(&mut random, &x, &model)?;
            chain.push(name);
            (x, model) = (view, viewed);
            assert_eq!(x.dims(), model.dims, "seed {seed}: {chain:?}");
            assert_eq!(x.to_vec::<u32>()?, model.values, "seed {seed}: {chain:?}");
            // Through a kernel that copies, and through an op that keeps the memory order.
            let joined = Tensor::cat(&[&x, &x], 0)?.narrow(0, x.dims()[0], x.dims()[0])?;
            assert_eq!(joined.to_vec::<u32>()?, model.values, "cat, seed {seed}: {chain:?}");
            let doubled: Vec<u32> = model.values.iter().map(|x| 2 * x).collect();
            assert_eq!(x.add(&x)?.to_vec::<u32>()?, doubled, "add, seed {seed}: {chain:?}");
        }
    }
    Ok(())
}

/// The predecessor's bug: a view that was rebuilt with offset 0.
pub fn a_strided_view_keeps_its_offset<B: Backend>(device: &B::Device) -> Result<()> {
    let base: Tensor<B> = Tensor::from_slice(&[1f32, 2., 3., 4., 5., 6.], 6, device)?;
    let view = base.narrow(0, 2, 4)?.as_strided(vec![2, 2], &[2, 1])?;
    assert_eq!(view.to_vec::<f32>()?, [3., 4., 5., 6.]);
    assert_eq!(view.contiguous()?.to_vec::<f32>()?, [3., 4., 5., 6.]);
    assert_eq!(view.transpose(0, 1)?.to_vec::<f32>()?, [3., 5., 4., 6.]);
    assert_eq!(view.reshape(4)?.to_vec::<f32>()?, [3., 4., 5., 6.]);
    assert_eq!(view.add(&view)?.to_vec::<f32>()?, [6., 8., 10., 12.]);
    assert!(base.narrow(0, 2, 4)?.as_strided(vec![2, 2], &[2, 2]).is_err());
    Ok(())
}

#[test]
fn chains_of_views_read_what_the_model_reads_on_the_cpu() -> Result<()> {
    chains_of_views_read_what_the_model_reads::<cpu::Storage>(&cpu::Device::with_threads(2)?)
}

#[test]
fn a_strided_view_keeps_its_offset_on_the_cpu() -> Result<()> {
    a_strided_view_keeps_its_offset::<cpu::Storage>(&cpu::Device::with_threads(1)?)
}
