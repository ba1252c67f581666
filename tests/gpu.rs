//! Tensors on a GPU: `GRIDGRAD_TEST_DEVICE` (`cuda`, say), else the emulator where it is compiled in.

use std::sync::{Mutex, MutexGuard, PoisonError};

use gridgrad::nn::state_dict::{self, Metadata};
use gridgrad::nn::{Linear, Scope};
use gridgrad::random::Philox;
use gridgrad::{DType, Device, Error, Result, Tensor, ops};

const GPU_DTYPES: [DType; 5] = [DType::F32, DType::Bf16, DType::F16, DType::I64, DType::U8];

/// The device, if there is one, for one test at a time: memory and waits are counted for the whole process.
fn device() -> Option<(Device, MutexGuard<'static, ()>)> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let device = match std::env::var("GRIDGRAD_TEST_DEVICE") {
        Ok(name) => name.parse().unwrap(),
        Err(_) if cfg!(feature = "emulator") => Device::Emulated,
        Err(_) => return None,
    };
    Some((device, ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)))
}

fn on_host(tensor: &Tensor) -> Tensor {
    tensor.to_device(Device::Cpu).unwrap()
}

#[test]
fn values_of_every_dtype_come_back_as_they_went() {
    let Some((device, _guard)) = device() else { return };
    for dtype in GPU_DTYPES {
        for shape in [vec![], vec![0, 3], vec![1], vec![3, 5, 7], vec![1000]] {
            let x = Tensor::from_index(&shape[..], dtype, |i| (i % 251) as f64).unwrap();
            let moved = x.to_device(device).unwrap();
            assert_eq!((moved.device(), moved.dtype(), moved.shape()), (device, dtype, x.shape()));
            assert_eq!(on_host(&moved).raw_bytes().unwrap(), x.raw_bytes().unwrap(), "{dtype} {shape:?}");
            assert_eq!(moved.to_f64_vec().unwrap(), x.to_f64_vec().unwrap());
            assert_eq!(moved.to_device(device).unwrap().id(), moved.id());
        }
    }
    let nan = f32::from_bits(0x7fc1_2345);
    let moved = Tensor::new(&[nan, -0.0, f32::INFINITY], [3]).unwrap().to_device(device).unwrap();
    let bits: Vec<u32> = moved.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
    assert_eq!(bits, [0x7fc1_2345, 0x8000_0000, 0x7f80_0000]);
    assert!(moved.to_vec::<i64>().is_err());
}

#[test]
fn tensors_are_filled_and_cast_where_they_are() {
    let Some((device, _guard)) = device() else { return };
    let x = Tensor::new(&[-1.5f32, 0.0, 2.75, 300.0], [4]).unwrap();
    let moved = x.to_device(device).unwrap();
    for dtype in GPU_DTYPES {
        let cast = moved.cast(dtype).unwrap();
        assert_eq!(cast.device(), device);
        assert_eq!(cast.to_f64_vec().unwrap(), x.cast(dtype).unwrap().to_f64_vec().unwrap(), "{dtype}");
    }
    let full = moved.full_like(7.0).unwrap();
    assert_eq!((full.device(), full.to_vec::<f32>().unwrap()), (device, vec![7.0; 4]));
}

#[test]
fn gradients_flow_through_a_move_to_where_the_variable_is() {
    let Some((device, _guard)) = device() else { return };
    let values = Tensor::randn([4, 6], DType::F32, Philox::new(1)).unwrap();
    let gradient = |via: Device, weights: &Tensor| -> Result<Tensor> {
        let x = values.variable()?;
        let probabilities = ops::softmax(&x.to_device(via)?, -1)?.to_device(Device::Cpu)?;
        let gradients = probabilities.mul(weights)?.sum_all()?.backward()?;
        Ok(gradients.get(&x).unwrap().clone())
    };
    let weights = Tensor::randn([4, 6], DType::F32, Philox::new(2)).unwrap();
    let (here, there) = (gradient(Device::Cpu, &weights).unwrap(), gradient(device, &weights).unwrap());
    assert_eq!(there.device(), Device::Cpu);
    for (a, b) in here.to_f64_vec().unwrap().into_iter().zip(there.to_f64_vec().unwrap()) {
        assert!((a - b).abs() < 1e-6, "{a} {b}");
    }
    let x = values.to_device(device).unwrap().variable().unwrap();
    let gradients = x.to_device(Device::Cpu).unwrap().square().unwrap().sum_all().unwrap().backward().unwrap();
    let gradient = gradients.get(&x).unwrap();
    assert_eq!(gradient.device(), device);
    let doubled: Vec<f64> = values.to_f64_vec().unwrap().iter().map(|v| 2.0 * v).collect();
    assert_eq!(gradient.to_f64_vec().unwrap(), doubled);
}

#[test]
fn what_a_device_cannot_do_is_an_error_that_says_so() {
    let Some((device, _guard)) = device() else { return };
    let x = Tensor::randn([3, 4], DType::F32, Philox::new(1)).unwrap();
    let moved = x.to_device(device).unwrap();

    let error = x.cast(DType::F64).unwrap().to_device(device).unwrap_err();
    let expected = format!("expected f32, bf16, f16, i64 or u8: {device} does not compute in f64");
    assert_eq!(error.to_string(), format!("to_device: got dtype f64, {expected}"));
    assert!(moved.cast(DType::F64).unwrap_err().to_string().contains(&expected));

    for (error, op) in
        [(moved.data::<f32>().unwrap_err(), "Tensor::data"), (moved.raw_bytes().unwrap_err(), "raw_bytes")]
    {
        assert!(matches!(error, Error::NotOnHost { device: at, .. } if at == device), "{error}");
        assert!(error.to_string().contains(op) && error.to_string().contains("copy its values with `to_vec`"));
    }
    assert!(matches!(moved.floats::<f32>("test").err(), Some(Error::NotOnHost { op: "test", .. })));

    let indices = Tensor::new(&[0i64, 2], [2]).unwrap();
    let scores = Tensor::ones([2, 4], DType::F32).unwrap();
    let mixed = [
        ops::embedding(&moved, &indices),
        x.index_select(0, &indices.to_device(device).unwrap()),
        moved.index_add(0, &indices.to_device(device).unwrap(), &scores),
        x.add(&moved),
        moved.matmul(&x.transpose(0, 1).unwrap()),
    ];
    for result in mixed {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::DeviceMismatch { left, right, .. } if left != right), "{error}");
        assert!(error.to_string().contains("move one with `to_device`"), "{error}");
    }
}

#[test]
fn memory_is_counted_kept_and_given_back() {
    let Some((device, _guard)) = device() else { return };
    device.release_cached().unwrap();
    device.reset_peak().unwrap();
    let before = device.memory_stats().unwrap();
    assert_eq!((before.cached, before.peak), (0, before.live));
    // Sizes that the pool does not round.
    let (small, large) = (Tensor::zeros([1024], DType::F32).unwrap(), Tensor::zeros([4096], DType::F32).unwrap());

    let (a, b) = (small.to_device(device).unwrap(), large.to_device(device).unwrap());
    let held = device.memory_stats().unwrap();
    assert_eq!(held.live - before.live, 5 * 4096);
    assert_eq!(held.allocations - before.allocations, 2);
    let shared = b.reshape([64, 64]).unwrap();
    drop((a, b));
    let half = device.memory_stats().unwrap();
    assert_eq!((half.live - before.live, half.cached), (4 * 4096, 4096));
    drop(shared);
    let none = device.memory_stats().unwrap();
    assert_eq!((none.live, none.cached, none.peak - before.live), (before.live, 5 * 4096, 5 * 4096));

    let again = large.to_device(device).unwrap();
    let reused = device.memory_stats().unwrap();
    assert_eq!((reused.allocations, reused.cached), (held.allocations, 4096));
    drop(again);
    device.release_cached().unwrap();
    assert_eq!(device.memory_stats().unwrap().cached, 0);
    device.reset_peak().unwrap();
    assert_eq!(device.memory_stats().unwrap().peak, before.live);
}

#[test]
fn waits_are_counted_and_ops_do_not_wait() {
    let Some((device, _guard)) = device() else { return };
    let waits = || device.waits().unwrap();
    let weight = Tensor::randn([9, 8], DType::F32, Philox::new(1)).unwrap().to_device(device).unwrap();
    let indices = Tensor::new(&[3i64, 8, 3], [3]).unwrap().to_device(device).unwrap();
    let start = waits();
    let weight = weight.variable().unwrap();
    let rows = ops::dropout(&ops::embedding(&weight, &indices).unwrap(), 0.5, Philox::new(2)).unwrap();
    let map = rows.reshape([1, 1, 3, 8]).unwrap();
    let resized = ops::interpolate(&map, [2, 6], ops::Interpolation::Bicubic { align_corners: false }).unwrap();
    let gradients = ops::softmax(&resized, -1).unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(waits(), start);
    gradients.get(&weight).unwrap().to_vec::<f32>().unwrap();
    assert_eq!(waits(), start + 1);
    resized.to_device(Device::Cpu).unwrap();
    assert_eq!(waits(), start + 2);
    device.synchronize().unwrap();
    assert_eq!(waits(), start + 3);
}

#[test]
fn an_index_outside_makes_nan_and_no_error() {
    let Some((device, _guard)) = device() else { return };
    for (dtype, width) in [(DType::F32, 8), (DType::Bf16, 8), (DType::F16, 3)] {
        let weight = Tensor::ones([4, width], dtype).unwrap().to_device(device).unwrap().variable().unwrap();
        let indices = Tensor::new(&[1i64, 4, -1, 3], [4]).unwrap().to_device(device).unwrap();
        let rows = ops::embedding(&weight, &indices).unwrap();
        let nan: Vec<bool> = rows.to_f64_vec().unwrap().iter().map(|v| v.is_nan()).collect();
        assert!(nan.iter().enumerate().all(|(i, &nan)| nan == (1..3).contains(&(i / width))), "{dtype}: {nan:?}");
        let sums = weight.index_add(0, &indices, &weight).unwrap();
        assert!(sums.to_f64_vec().unwrap().iter().all(|v| v.is_nan()), "{dtype}");
        let columns = Tensor::new(&[0i64, i64::MAX, 1, i64::MIN], [4, 1]).unwrap().to_device(device).unwrap();
        let nan: Vec<bool> =
            weight.gather(1, &columns).unwrap().to_f64_vec().unwrap().iter().map(|v| v.is_nan()).collect();
        assert_eq!(nan, [false, true, false, true]);
    }
}

/// Enough for several tiles of the sort, three of its passes, and segments over several tiles.
#[test]
fn many_indices_are_summed_in_their_order() {
    let Some((device, _guard)) = device() else { return };
    for (rows, count, width) in [(70_000, 3000, 1), (3, 2500, 4), (300, 1025, 8)] {
        let stream = Philox::new(rows as u64);
        let index =
            |i: usize| if i.is_multiple_of(7) { (rows - 1) as f64 } else { stream.below(i as u64, rows) as f64 };
        let indices = Tensor::from_index([count], DType::I64, index).unwrap();
        let base = Tensor::randn([rows, width], DType::F32, stream.fork(1)).unwrap();
        let values = Tensor::randn([count, width], DType::F32, stream.fork(2)).unwrap();
        let expected = base.index_add(0, &indices, &values).unwrap().to_f64_vec().unwrap();
        let [base, indices, values] = [base, indices, values].map(|tensor| tensor.to_device(device).unwrap());
        let sums = base.index_add(0, &indices, &values).unwrap().to_f64_vec().unwrap();
        for (at, (got, want)) in sums.into_iter().zip(expected).enumerate() {
            assert!((got - want).abs() <= 1e-4, "{rows} rows, element {at}: {got}, expected {want}");
        }
    }
}

#[test]
fn parameters_move_and_keep_their_identity() {
    let Some((device, _guard)) = device() else { return };
    let scope = Scope::new(3, DType::F32);
    let layer = Linear::new(&scope.child("head"), 5, 4, true).unwrap();
    let parameters = scope.parameters();
    let state = |device: Device| -> Vec<(Vec<f64>, Device)> {
        parameters
            .iter()
            .map(|parameter| {
                assert_eq!(parameter.tensor().device(), device);
                (parameter.tensor().to_f64_vec().unwrap(), device)
            })
            .collect()
    };
    let before: Vec<Vec<f64>> = state(Device::Cpu).into_iter().map(|(values, _)| values).collect();
    let identities: Vec<_> = parameters.iter().map(|parameter| parameter.tensor().id()).collect();
    parameters.to_device(device).unwrap();
    let after: Vec<Vec<f64>> = state(device).into_iter().map(|(values, _)| values).collect();
    assert_eq!(before, after);
    assert_eq!(identities, parameters.iter().map(|parameter| parameter.tensor().id()).collect::<Vec<_>>());

    let x = Tensor::ones([2, 5], DType::F32).unwrap().to_device(device).unwrap();
    let gradients = layer.forward(&x).unwrap().sum_all().unwrap().backward().unwrap();
    for parameter in parameters.iter() {
        let gradient = gradients.get(&parameter.tensor()).unwrap();
        assert_eq!((gradient.device(), gradient.to_f64_vec().unwrap()), (device, vec![2.0; gradient.elements()]));
    }
    parameters.to_device(Device::Cpu).unwrap();
    state(Device::Cpu);
}

#[test]
fn state_dicts_are_written_from_a_device_and_loaded_to_one() {
    let Some((device, _guard)) = device() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    let model = |seed: u64| {
        let scope = Scope::new(seed, DType::F32);
        Linear::new(&scope.child("head"), 6, 3, true).unwrap();
        scope.parameters().clone()
    };
    let (written, loaded) = (model(1), model(2));
    let values = |parameters: &gridgrad::nn::Parameters| -> Vec<Vec<f64>> {
        parameters.iter().map(|parameter| parameter.tensor().to_f64_vec().unwrap()).collect()
    };
    let expected = values(&written);
    assert_ne!(values(&loaded), expected);
    written.to_device(device).unwrap();
    loaded.to_device(device).unwrap();
    state_dict::write(&path, &written.state_dict(), Metadata::new()).unwrap();
    let (state, _) = state_dict::read(&path).unwrap();
    assert!(state.values().all(|tensor| tensor.device() == Device::Cpu));
    loaded.load_state_dict(&state).unwrap();
    assert!(loaded.iter().all(|parameter| parameter.tensor().device() == device));
    assert_eq!(values(&loaded), expected);

    // Straight from a device to the processor.
    let host = model(2);
    host.load_state_dict(&written.state_dict()).unwrap();
    assert!(host.iter().all(|parameter| parameter.tensor().device() == Device::Cpu));
    assert_eq!(values(&host), expected);
}
