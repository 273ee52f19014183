//! Calls that no client of ours makes: each is refused, and the session goes on.

use candle_core::{DType, Layout};
use tiny_sd::Result;
use tiny_sd::backend::{Activation, Conv2d, Size2d};
use tiny_sd::backend::{Backend, Fused, Linear, Role, cpu};
use tiny_sd::remote::executor::Limits;
use tiny_sd::remote::loopback::Loopback;
use tiny_sd::remote::op::{Binary, Call, Copy2d, Id, Op, Operand, Reduce};
use tiny_sd::remote::storage::Storage;
use tiny_sd::tensor::Tensor;

use super::{LIMITS, Worker};

const LARGE: usize = usize::MAX;

fn view(id: Id, dims: &[usize], stride: &[usize], offset: usize) -> Operand {
    let layout = Layout::new(dims.into(), stride.to_vec(), offset);
    Operand { id, layout: Some(layout) }
}

fn whole(id: Id) -> Operand {
    Operand { id, layout: None }
}

/// A session with some buffers: f32 (6), f32 (2, 3), u32 indices (2) of which one is 9, a prepared
/// weight (4, 3).
struct Victim {
    session: Loopback,
    flat: Id,
    matrix: Id,
    ids: Id,
    packed: Id,
}

impl Victim {
    fn new(limits: Limits) -> Result<Self> {
        let session = Worker::new()?.connect_with("worker", limits)?;
        let constant = |dtype, bytes: Vec<u8>| {
            session.session().call(Call { op: Op::Constant { dtype, bytes }, args: vec![] })
        };
        let flat = constant(DType::F32, [0u8; 24].to_vec())?;
        let zeros = Op::Zeros { dtype: DType::F32, dims: vec![2, 3] };
        let matrix = session.session().call(Call { op: zeros, args: vec![] })?;
        let ids = [1u32, 9].iter().flat_map(|id| id.to_le_bytes()).collect();
        let ids = constant(DType::U32, ids)?;
        let zeros = Op::Zeros { dtype: DType::F32, dims: vec![4, 3] };
        let weight = session.session().call(Call { op: zeros, args: vec![] })?;
        let prepare = Op::Fused(Fused::Prepare(Role::Linear));
        let packed = session.session().call(Call { op: prepare, args: vec![whole(weight)] })?;
        Ok(Self { session, flat, matrix, ids, packed })
    }

    /// The error of a call.
    fn refusal(&self, op: Op, args: Vec<Operand>) -> Result<String> {
        let session = self.session.session();
        let target = args.first().map(|arg| arg.id);
        let is_in_place = op.is_in_place();
        let what = format!("{op:?} of {args:?}");
        let made = session.call(Call { op, args })?;
        let id = target.filter(|_| is_in_place).unwrap_or(made);
        let refused = session.data(session.read(id, 1 << 20)?);
        Ok(refused.expect_err(&what).to_string())
    }

    /// Checks that a call is an error that names its op.
    fn refuses(&self, op: Op, args: Vec<Operand>) -> Result<()> {
        let name = op.name();
        let text = self.refusal(op, args)?;
        assert!(text.contains(name) && !text.contains("panicked"), "{name}: {text}");
        Ok(())
    }

    /// Whether the session still computes.
    fn is_alive(&self) -> Result<()> {
        let x: Tensor<Storage> = Tensor::from_slice(&[1f32, 2.], 2, &self.session.device())?;
        assert_eq!(x.add(&x)?.to_vec::<f32>()?, [2., 4.]);
        Ok(())
    }
}

/// An empty view may say that it begins anywhere; and a large shape that is empty in one dimension
/// costs no memory, but work.
#[test]
fn empty_views_and_empty_results_cost_nothing_wherever_they_claim_to_be() -> Result<()> {
    let victim = Victim::new(LIMITS)?;
    let session = victim.session.session();
    let nothing = || view(victim.flat, &[0, 3], &[9, 9], LARGE);
    for (op, args) in [
        (Op::Affine { mul: 1.0, add: 0.0 }, vec![nothing()]),
        (Op::Fused(Fused::Cat { dim: 0 }), vec![nothing()]),
        (Op::Matmul, vec![nothing(), view(victim.flat, &[3, 2], &[2, 1], 0)]),
    ] {
        let made = session.call(Call { op: op.clone(), args })?;
        assert_eq!(session.data(session.read(made, 0)?)?, [0u8; 0], "{op:?}");
    }
    let large = 1 << 40;
    let zeros = Op::Zeros { dtype: DType::F32, dims: vec![large, 0] };
    assert!(victim.refusal(zeros, vec![])?.contains("--session-memory"));
    let repeated = vec![view(victim.flat, &[large, 0], &[0, 1], 0)];
    let text = victim.refusal(Op::Affine { mul: 1.0, add: 0.0 }, repeated)?;
    assert!(text.contains("--session-memory"), "{text}");
    victim.is_alive()
}

#[test]
fn views_that_do_not_fit_their_buffer_are_refused() -> Result<()> {
    let victim = Victim::new(LIMITS)?;
    let x = victim.flat;
    let affine = || Op::Affine { mul: 1.0, add: 0.0 };
    for operand in [
        view(x, &[6], &[1], 1),
        view(x, &[7], &[1], 0),
        view(x, &[2, 3], &[4, 1], 0),
        view(x, &[1], &[1], LARGE),
        view(x, &[2], &[LARGE], 0),
        view(x, &[3, 2], &[LARGE / 2, 1], 0),
        view(x, &[LARGE], &[0], LARGE),
        view(x, &[1 << 32, 1 << 31], &[1 << 32, 1 << 32], 0),
        view(x, &[1, 1, 1, 1, 1, 1, 1, 7], &[1; 8], 0),
    ] {
        let what = format!("{operand:?}");
        let text = victim.refusal(affine(), vec![operand])?;
        assert!(text.contains("affine") && text.contains("reaches beyond its 6"), "{what}: {text}");
    }
    // It fits, but nobody could want it.
    let repeated = victim.refusal(
        Op::Reduce { op: Reduce::Sum, dims: vec![0] },
        vec![view(x, &[1 << 40, 6], &[0, 1], 0)],
    )?;
    assert!(repeated.contains("--session-memory"), "{repeated}");
    let set = Op::ConstSet { value: 1.0 };
    let written = victim.refusal(set, vec![view(victim.matrix, &[1 << 40, 6], &[0, 1], 0)])?;
    assert!(written.contains("--session-memory"), "{written}");
    victim.is_alive()
}

#[test]
fn operands_that_do_not_fit_their_op_are_refused() -> Result<()> {
    let victim = Victim::new(LIMITS)?;
    let Victim { flat, matrix, ids, .. } = victim;
    let conv = |padding, upsample| {
        Op::Fused(Fused::Conv2d(Conv2d { stride: 1, padding, upsample, residual: false }))
    };
    let image = || view(flat, &[1, 1, 2, 3], &[6, 6, 3, 1], 0);
    let enlarged = Some(Size2d { height: LARGE, width: LARGE });
    let zeros = |dims| Op::Zeros { dtype: DType::F32, dims };
    // It says that the result is not much larger, and that it is.
    let enlarge = |scale_height, scale_width| Op::UpsampleBilinear2d {
        size: Size2d { height: 4, width: 6 },
        align_corners: false,
        scale_height,
        scale_width,
    };
    for (op, args) in [
        (enlarge(Some(0.5), None), vec![image()]),
        (enlarge(None, Some(1.1)), vec![image()]),
        (enlarge(Some(f64::MIN_POSITIVE), None), vec![image()]),
        (enlarge(None, Some(f64::NAN)), vec![image()]),
        (Op::Matmul, vec![whole(matrix)]),
        (Op::Matmul, vec![]),
        (Op::Matmul, vec![whole(matrix), whole(matrix)]),
        (Op::Matmul, vec![whole(matrix), view(ids, &[3, 1], &[0, 0], 0)]),
        (Op::Affine { mul: 1.0, add: 0.0 }, vec![]),
        (Op::Binary(Binary::Add), vec![whole(flat), whole(matrix)]),
        (Op::Binary(Binary::Add), vec![whole(flat); 64]),
        (Op::Reduce { op: Reduce::Sum, dims: vec![0, 0] }, vec![whole(matrix)]),
        (Op::Reduce { op: Reduce::Sum, dims: vec![LARGE] }, vec![whole(matrix)]),
        (Op::IndexSelect { dim: 0 }, vec![whole(matrix), whole(ids)]),
        (Op::IndexSelect { dim: LARGE }, vec![whole(matrix), whole(ids)]),
        (Op::Gather { dim: 0 }, vec![whole(flat), whole(ids)]),
        (Op::Gather { dim: 0 }, vec![whole(flat), whole(flat)]),
        (Op::IndexAdd { dim: 0 }, vec![whole(flat), whole(ids), view(flat, &[2], &[1], 0)]),
        (Op::UpsampleNearest1d { width: LARGE }, vec![view(flat, &[1, 2, 3], &[6, 3, 1], 0)]),
        (Op::UpsampleNearest2d { size: Size2d { height: LARGE, width: 2 } }, vec![image()]),
        (conv(LARGE, None), vec![image(), image()]),
        (conv(0, enlarged), vec![image(), image()]),
        (Op::Fused(Fused::Cat { dim: 9 }), vec![whole(flat)]),
        (Op::Fused(Fused::LinearCombination(vec![])), vec![]),
        (zeros(vec![LARGE, LARGE]), vec![]),
        (zeros(vec![0, LARGE, LARGE]), vec![]),
        (zeros(vec![1 << 30]), vec![]),
        (Op::Constant { dtype: DType::F32, bytes: vec![1, 2, 3] }, vec![]),
        (Op::Received { transfer: 0, dtype: DType::F32, len: LARGE }, vec![]),
    ] {
        victim.refuses(op, args)?;
    }
    victim.is_alive()
}

#[test]
fn a_weight_that_is_packed_for_one_op_is_nothing_to_any_other() -> Result<()> {
    let victim = Victim::new(LIMITS)?;
    let Victim { flat, matrix, ids, packed, .. } = victim;
    let linear =
        || Op::Fused(Fused::Linear(Linear { activation: Activation::Identity, residual: false }));
    let conv = Op::Fused(Fused::Conv2d(Conv2d { padding: 0, ..Conv2d::same(1) }));
    for (op, args) in [
        (Op::Binary(Binary::Add), vec![whole(packed), whole(packed)]),
        (Op::Cast { dtype: DType::F16 }, vec![whole(packed)]),
        (Op::Copy, vec![whole(packed)]),
        (Op::IndexSelect { dim: 0 }, vec![whole(packed), view(ids, &[1], &[1], 0)]),
        (Op::Fused(Fused::Cat { dim: 0 }), vec![whole(packed), whole(packed)]),
        (linear(), vec![whole(matrix), view(packed, &[2, 3], &[3, 1], 0)]),
        (linear(), vec![whole(packed), whole(packed)]),
        (
            conv,
            vec![
                view(flat, &[1, 3, 1, 2], &[6, 2, 2, 1], 0),
                view(packed, &[4, 3, 1, 1], &[3, 1, 1, 1], 0),
            ],
        ),
        (Op::Fused(Fused::Prepare(Role::Linear)), vec![whole(packed)]),
        (Op::ConstSet { value: 1.0 }, vec![view(packed, &[1], &[1], 0)]),
    ] {
        victim.refuses(op, args)?;
    }
    victim.is_alive()
}

#[test]
fn a_target_that_could_not_be_written_is_not_to_be_read() -> Result<()> {
    let victim = Victim::new(LIMITS)?;
    let Victim { flat, matrix, ids, .. } = victim;
    let copy = Copy2d {
        rows: 2,
        columns: 3,
        source_stride: 3,
        target_stride: LARGE,
        source_offset: 0,
        target_offset: 0,
    };
    // The same element again and again.
    let often = Copy2d { rows: 1 << 50, columns: 1, source_stride: 0, target_stride: 0, ..copy };
    for (op, others) in [
        (Op::Copy2d(copy), vec![whole(matrix)]),
        (Op::Copy2d(often), vec![whole(matrix)]),
        (Op::CopyStrided { offset: LARGE }, vec![whole(matrix)]),
        (Op::ScatterSet { dim: 0 }, vec![whole(ids), view(matrix, &[2], &[1], 0)]),
    ] {
        let zeros = Op::Zeros { dtype: DType::F32, dims: vec![6] };
        let target = victim.session.session().call(Call { op: zeros, args: vec![] })?;
        victim.refuses(op, std::iter::once(whole(target)).chain(others).collect())?;
    }
    let nothing = Copy2d { rows: 1 << 50, columns: 0, source_stride: LARGE, ..copy };
    let session = victim.session.session();
    session.call(Call { op: Op::Copy2d(nothing), args: vec![whole(flat), whole(matrix)] })?;
    assert_eq!(session.data(session.read(flat, 24)?)?, [0u8; 24]);
    // The target is its own source.
    let text = victim.refusal(Op::CopyStrided { offset: 0 }, vec![whole(flat), whole(flat)])?;
    assert!(text.contains("copy_strided") && text.contains("is not there"), "{text}");
    victim.is_alive()
}

#[test]
fn a_buffer_that_was_freed_is_not_there() -> Result<()> {
    let victim = Victim::new(LIMITS)?;
    victim.session.session().free(victim.flat);
    let text = victim.refusal(Op::Affine { mul: 1.0, add: 0.0 }, vec![whole(victim.flat)])?;
    assert!(text.contains("affine") && text.contains("buffer #0 is not there"), "{text}");
    victim.session.session().free(victim.flat);
    victim.is_alive()
}

#[test]
fn what_is_malformed_ends_the_session_and_nothing_else() -> Result<()> {
    for call in [
        // A buffer of the future.
        Call { op: Op::Copy, args: vec![whole(Id(1 << 40))] },
        // More dimensions than there are.
        Call { op: Op::Copy, args: vec![view(Id(0), &[1; 9], &[1; 9], 0)] },
        // A shape whose size overflows.
        Call { op: Op::Copy, args: vec![view(Id(0), &[LARGE, LARGE], &[0, 0], 0)] },
        // A write to nowhere.
        Call { op: Op::ConstSet { value: 0.0 }, args: vec![] },
    ] {
        let victim = Victim::new(LIMITS)?;
        let session = victim.session.session();
        let what = format!("{call:?}");
        session.call(call)?;
        let error = session.mark().and_then(|mark| session.done(mark)).expect_err(&what);
        assert!(error.to_string().contains("malformed message"), "{what}: {error}");
    }
    Ok(())
}

/// candle takes batches for rows where the right side repeats: strides that this breaks.
#[test]
fn a_product_with_a_repeated_matrix_reads_the_right_elements() -> Result<()> {
    let device = cpu::Device::with_threads(1)?;
    let product = |lhs: &Tensor<cpu::Storage>, m: usize, k: usize| -> Result<Vec<f32>> {
        let values: Vec<f32> = (0..2 * k).map(|i| i as f32 - 1.0).collect();
        let rhs: Tensor<cpu::Storage> = Tensor::from_slice(&values, (1, k, 2), &device)?;
        let rhs = rhs.broadcast_as((2, k, 2))?;
        let views = [lhs, &rhs]
            .map(|x| tiny_sd::backend::View { storage: &**x.storage(), layout: x.layout() });
        let product = tiny_sd::remote::op::execute::execute(&Op::Matmul, &device, &views)?;
        let found = candle_core::backend::BackendStorage::to_cpu_storage(&product)?;
        let candle_core::CpuStorage::F32(found) = found else { panic!("not f32") };
        // As Tensor does it: of row-major copies.
        let expected = lhs.matmul(&rhs)?;
        assert_eq!(expected.dims(), [2, m, 2]);
        assert_eq!(found, expected.to_vec::<f32>()?, "{lhs:?}");
        Ok(found)
    };
    let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let base: Tensor<cpu::Storage> = Tensor::from_slice(&values, 12, &device)?;
    // Columns lie closer than rows.
    product(&base.as_strided((2, 3, 2), &[6, 1, 3])?, 3, 2)?;
    // Rows of different batches overlap.
    product(&base.as_strided((2, 2, 1), &[2, 4, 1])?, 2, 1)?;
    // A dimension of size 1 may have any stride.
    product(&base.as_strided((2, 1, 3), &[3, 12_345, 1])?, 1, 3)?;
    Ok(())
}

/// A reduction over a dimension that was added by broadcasting: candle divides by its stride.
#[test]
fn a_reduction_over_an_added_dimension_is_computed() -> Result<()> {
    fn check<B: Backend>(device: &B::Device) -> Result<()> {
        let x: Tensor<B> = Tensor::from_slice(&[1f32, 5., 3.], 3, device)?;
        assert_eq!(x.broadcast_as((1, 3))?.max_keepdim(0)?.to_vec::<f32>()?, [1., 5., 3.]);
        Ok(())
    }
    check::<cpu::Storage>(&cpu::Device::with_threads(1)?)?;
    check::<Storage>(&Worker::new()?.connect("worker")?.device())
}
