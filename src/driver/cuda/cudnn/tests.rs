use super::*;

fn windows(extent: usize, side: usize, stride: usize, padding: usize) -> Windows {
    Windows { dtype: DType::Bf16, input: [2, extent, extent, 3], out: 24, side, stride, padding }
}

#[test]
fn windows_have_the_extents_of_cross_scale_embeddings() {
    for side in [4, 8, 16, 32] {
        assert_eq!(windows(224, side, 4, (side - 4) / 2).output_map(), Some([56, 56]), "{side}");
    }
    assert_eq!(windows(5, 2, 2, 0).output_map(), Some([2, 2]));
    assert_eq!(windows(3, 5, 1, 0).output_map(), None);
    assert_eq!(windows(3, 3, 0, 0).output_map(), None);
}

#[test]
fn the_processor_and_absent_gpus_are_refused_with_a_reason() {
    for device in [Device::Cpu, Device::Cuda(99)] {
        let error = Cudnn::open(device).unwrap_err();
        assert!(matches!(error, Error::DeviceUnavailable { .. }), "{error}");
    }
}

/// Where the library is installed, GPU or not, it has every call that is made here.
#[test]
fn the_library_has_every_call() {
    if !libraries::load_cudnn() {
        println!("skipped: no cuDNN 9 was found");
        return;
    }
    // SAFETY: the library was just found; symbols are looked up, and the one that is called takes nothing and returns a
    // number.
    let (absent, version) = unsafe {
        let absent: Vec<_> = CALLS.iter().filter(|call| sys::culib().get::<*const c_void>(**call).is_err()).collect();
        (absent, sys::cudnnGetVersion())
    };
    assert!(absent.is_empty(), "{absent:?}");
    assert!((90_000..100_000).contains(&version), "{version}");
}
