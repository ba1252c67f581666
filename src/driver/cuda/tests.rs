//! The driver end to end against stand-ins for NVIDIA's libraries, written in C (`tests/`). A library is loaded once per
//! process, so each test runs in a child: this test binary again.

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::path::Path;
use std::process::Command;

use cudarc::{cublaslt, driver};

use super::*;
use crate::driver::seam::{Argument, Epilogue};
use crate::tensor::DType;

const CHILD: &str = "GRIDGRAD_TEST_CUDA";
const DRIVER: &str = include_str!("tests/driver.c");
const CUBLASLT: &str = include_str!("tests/cublaslt.c");

/// Runs `body` in a child process that finds only the stand-ins; does nothing without a C compiler.
fn in_child(test: &str, environment: &[(&str, &str)], body: impl FnOnce()) {
    in_child_of(DRIVER, CUBLASLT, test, environment, body);
}

fn in_child_of(
    driver_source: &str,
    cublaslt_source: &str,
    test: &str,
    environment: &[(&str, &str)],
    body: impl FnOnce(),
) {
    if std::env::var_os(CHILD).is_some_and(|child| child == test) {
        body();
        println!("the child came to its end");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (driver, libraries) = (folder.path().join("driver"), folder.path().join("libraries"));
    // The driver goes by the name that is tried first; so does cuBLASLt once loaded by its path.
    let built = build(&driver, "libcuda.so", "libcuda.so", driver_source)
        .and_then(|()| build(&libraries, "libcublasLt.so.13", "libcublasLt.so", cublaslt_source));
    if built.is_none() {
        println!("skipped: no C compiler `cc` to build the stand-in libraries with");
        return;
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("driver::cuda::tests::{test}"), "--nocapture", "--test-threads=1"])
        .envs([(CHILD, test), ("GRIDGRAD_SYNC", "0"), ("GRIDGRAD_TF32", "0")])
        .env("LD_LIBRARY_PATH", driver)
        .env("GRIDGRAD_CUDA_LIBS", libraries)
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout);
    let ended = child.status.success() && output.contains("the child came to its end");
    assert!(ended, "{output}{}", String::from_utf8_lossy(&child.stderr));
}

fn build(folder: &Path, name: &str, soname: &str, source: &str) -> Option<()> {
    std::fs::create_dir(folder).unwrap();
    std::fs::write(folder.join("source.c"), source).unwrap();
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", &format!("-Wl,-soname,{soname}"), "source.c", "-o", name])
        .current_dir(folder)
        .output()
        .ok()?;
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    Some(())
}

fn images(module: &str) -> Option<&'static [u8]> {
    match module {
        "good" => Some(b"good"),
        "other" => Some(b"other GPUs only"),
        _ => None,
    }
}

fn stand_in() -> Cuda {
    Cuda::with_images(0, Images { find: images, targets: "sm_70" }).unwrap()
}

/// From here on, this call of the driver fails with this code; `""` ends that.
fn fail(call: &CStr, code: c_int) {
    // SAFETY: the stand-in has this function, of this type.
    unsafe {
        let set = driver::sys::culib().get::<unsafe extern "C" fn(*const c_char, c_int)>("stand_in_fail").unwrap();
        set(call.as_ptr(), code);
    }
}

/// What the driver has written down since it was asked last.
fn log() -> String {
    // SAFETY: the stand-in has these functions, of these types; its text ends in 0 and changes with its next call.
    unsafe {
        let read = driver::sys::culib().get::<unsafe extern "C" fn() -> *const c_char>("stand_in_log").unwrap();
        let text = CStr::from_ptr(read()).to_str().unwrap().to_owned();
        driver::sys::culib().get::<unsafe extern "C" fn()>("stand_in_clear").unwrap()();
        text
    }
}

/// Allocations that are alive.
fn allocations() -> usize {
    // SAFETY: the stand-in has this function, of this type.
    unsafe { driver::sys::culib().get::<unsafe extern "C" fn() -> usize>("stand_in_used").unwrap()() }
}

fn launch(cuda: &Cuda, function: &Function, grid: u32, shared: u32) -> Result<()> {
    let mut arguments = Arguments::new();
    arguments.push(Address(0x1122));
    arguments.push([1u32, 2, 3]);
    arguments.push(1.0f32);
    // SAFETY: the stand-in runs nothing.
    unsafe { cuda.launch(function, Geometry { grid: [grid, 2, 1], block: [128, 1, 1], shared }, &arguments) }
}

const LAUNCHED: &str = "4 2 1, 128 1 1, 0: 2211000000000000 010000000200000003000000 0000803f\n";

#[test]
fn work_is_timed_between_two_events() {
    in_child("work_is_timed_between_two_events", &[], || {
        let cuda = stand_in();
        log();
        let timer = cuda.start_timer().unwrap().unwrap();
        let address = cuda.allocate(16).unwrap();
        assert_eq!(timer.stop().unwrap(), std::time::Duration::from_micros(1500));
        assert_eq!(log().matches("event").count(), 2);
        cuda.free(address, 16);

        let timer = cuda.start_timer().unwrap().unwrap();
        fail(c"cuEventRecord", 1);
        assert!(timer.stop().unwrap_err().to_string().contains("cuEventRecord"));
        fail(c"", 0);
    });
}

#[test]
fn memory_goes_there_and_back() {
    in_child("memory_goes_there_and_back", &[], || {
        let cuda = stand_in();
        assert_eq!(cuda.device(), Device::Cuda(0));
        let Properties { name, compute_capability, multiprocessors, shared_memory_per_block } = cuda.properties();
        assert_eq!((name.as_str(), *compute_capability, *multiprocessors), ("Stand-in", (9, 0), 132));
        assert_eq!(*shared_memory_per_block, 232_448);
        let beginning = log();
        assert!(beginning.contains("pool 4 ffffffffffffffff\n") && beginning.contains("stream 1\n"), "{beginning}");

        // More than both halves of the staging memory, of a length that fits nothing.
        let bytes: Vec<u8> = (0..9_999_999u64).map(|i| ((i * i) >> 7) as u8).collect();
        let (first, second) = (cuda.allocate(bytes.len()).unwrap(), cuda.allocate(bytes.len()).unwrap());
        cuda.upload(&bytes[..3], first).unwrap();
        cuda.upload(&bytes, first).unwrap();
        assert_eq!(log(), "event\nevent\n");
        cuda.copy(first, second, bytes.len()).unwrap();
        cuda.fill(second.offset(10), 7, 20).unwrap();
        let mut back = vec![0; bytes.len()];
        std::thread::scope(|scope| scope.spawn(|| cuda.download(second, &mut back).unwrap()).join().unwrap());
        assert_eq!(log(), "wait\n");
        assert!(back[..10] == bytes[..10] && back[10..30] == [7; 20] && back[30..] == bytes[30..]);

        // Nothing is nothing, whatever the address.
        cuda.upload(&[], Address::NULL).unwrap();
        cuda.download(Address::NULL, &mut []).unwrap();
        cuda.copy(Address::NULL, Address::NULL, 0).unwrap();
        cuda.fill(Address::NULL, 1, 0).unwrap();

        cuda.free(first, bytes.len());
        cuda.free(second, bytes.len());
        assert_eq!(allocations(), 1, "the workspace of matrix products");
        drop(cuda);
        assert_eq!(allocations(), 0);
        assert!(log().ends_with("release\n"));
    });
}

#[test]
fn kernels_are_found_and_given_their_arguments() {
    in_child("kernels_are_found_and_given_their_arguments", &[], || {
        let cuda = stand_in();
        log();
        let scale = cuda.load("good", "scale").unwrap();
        assert_eq!((scale.name.as_str(), &scale.parameters[..]), ("scale", &[8, 12, 4][..]));
        assert_eq!(cuda.load("good", "scale").unwrap().handle, scale.handle);
        assert_eq!(log(), "module good aligned 1\n");
        launch(&cuda, &scale, 4, 0).unwrap();
        assert_eq!(log(), format!("launch {LAUNCHED}"));
        launch(&cuda, &scale, 0, 0).unwrap();
        assert_eq!(log(), "");

        // Shared memory is asked for once, and again only for more.
        for shared in [48 << 10, 60_000, 50_000, 70_000] {
            launch(&cuda, &scale, 1, shared).unwrap();
        }
        let asked = log().lines().filter(|line| line.starts_with("attribute")).collect::<Vec<_>>().join(", ");
        assert_eq!(asked, "attribute 8 60000, attribute 8 70000");
        let error = launch(&cuda, &scale, 1, 300_000).unwrap_err().to_string();
        assert!(error.contains("kernel scale: wants 300000 bytes of shared memory per block, the GPU has 232448"));

        fail(c"cuLaunchKernel", 701);
        let error = launch(&cuda, &scale, 1, 0).unwrap_err();
        assert!(matches!(error, Error::Gpu { call: "cuLaunchKernel", .. }), "{error:?}");
        assert!(error.to_string().contains("LAUNCH_OUT_OF_RESOURCES: scale with grid [1, 2, 1]"), "{error}");
    });
}

#[test]
fn kernels_that_cannot_run_are_refused_with_what_to_do() {
    in_child("kernels_that_cannot_run_are_refused_with_what_to_do", &[], || {
        let cuda = stand_in();
        let refusal = |module, kernel| match cuda.load(module, kernel).unwrap_err() {
            Error::Kernel { kernel, reason, .. } => (kernel, reason),
            other => panic!("{other:?}"),
        };
        let (kernel, reason) = refusal("other", "scale");
        assert!(kernel == "other" && reason.starts_with("CUDA_ERROR_NO_BINARY_FOR_GPU: the GPU is a Stand-in"));
        for part in ["capability 9.0", "code for sm_70", "newer driver", "GRIDGRAD_CUDA_TARGETS"] {
            assert!(reason.contains(part), "{reason}");
        }
        fail(c"cuModuleLoadData", 222);
        assert!(refusal("good", "scale").1.starts_with("CUDA_ERROR_UNSUPPORTED_PTX_VERSION: the GPU is"));
        fail(c"", 0);
        assert!(refusal("absent", "scale").1.contains("not among the GPU code of this build"));
        assert!(refusal("good", "absent").1.contains("no such kernel in module good"));
        assert!(refusal("good", "a\0b").1.contains("no such kernel in module good"));
    });
}

#[test]
fn no_room_is_told_after_the_reserve_was_given_back() {
    in_child("no_room_is_told_after_the_reserve_was_given_back", &[], || {
        let cuda = stand_in();
        log();
        fail(c"cuMemAllocAsync", 2);
        let error = cuda.allocate(4000).unwrap_err();
        assert!(matches!(error, Error::OutOfDeviceMemory { requested: 4000, free: 600, total: 1000, .. }), "{error:?}");
        assert_eq!(log(), "wait\ntrim\n");
        fail(c"", 0);
        assert!(cuda.allocate(1).is_ok(), "nothing is lost");
        fail(c"cuModuleLoadData", 2);
        let error = cuda.load("good", "scale").unwrap_err();
        assert!(matches!(error, Error::OutOfDeviceMemory { requested: 4, .. }), "{error:?}");
    });
}

#[test]
fn failed_work_loses_the_device() {
    in_child("failed_work_loses_the_device", &[], || {
        let cuda = stand_in();
        let memory = cuda.allocate(1).unwrap();
        let scale = cuda.load("good", "scale").unwrap();
        launch(&cuda, &scale, 1, 0).unwrap();
        fail(c"cuStreamSynchronize", 700);
        let lost = cuda.synchronize().unwrap_err();
        assert!(matches!(lost, Error::DeviceLost { .. }), "{lost:?}");
        let words = lost.to_string();
        assert!(words.contains("CUDA_ERROR_ILLEGAL_ADDRESS in kernel scale or one launched before it"), "{words}");
        // Whatever is asked afterwards has the same answer, and the driver is left alone.
        log();
        assert_eq!(cuda.allocate(1).unwrap_err().to_string(), words);
        assert_eq!(launch(&cuda, &scale, 1, 0).unwrap_err().to_string(), words);
        cuda.free(memory, 1);
        assert_eq!(cuda.begin_capture().unwrap_err().to_string(), words);
        assert_eq!(log(), "");
    });
}

#[test]
fn waiting_after_every_launch_names_the_kernel() {
    in_child("waiting_after_every_launch_names_the_kernel", &[("GRIDGRAD_SYNC", "1")], || {
        let cuda = stand_in();
        let scale = cuda.load("good", "scale").unwrap();
        log();
        launch(&cuda, &scale, 1, 0).unwrap();
        assert!(log().ends_with("wait\n"));
        fail(c"cuStreamSynchronize", 719);
        let error = launch(&cuda, &scale, 1, 0).unwrap_err().to_string();
        assert!(error.contains("CUDA_ERROR_LAUNCH_FAILED in kernel scale;"), "{error}");
    });
}

#[test]
fn an_error_of_free_comes_with_the_next_call() {
    in_child("an_error_of_free_comes_with_the_next_call", &[], || {
        let cuda = stand_in();
        let memory = cuda.allocate(1).unwrap();
        fail(c"cuMemFreeAsync", 1);
        cuda.free(memory, 1);
        fail(c"", 0);
        assert_eq!(cuda.synchronize().unwrap_err().to_string(), "cuda:0: cuMemFreeAsync: CUDA_ERROR_INVALID_VALUE");
        cuda.synchronize().unwrap();
    });
}

#[test]
fn launches_are_recorded_and_run_again() {
    in_child("launches_are_recorded_and_run_again", &[("GRIDGRAD_SYNC", "1")], || {
        let cuda = stand_in();
        let scale = cuda.load("good", "scale").unwrap();
        let memory = cuda.allocate(16).unwrap();
        let alive = allocations();
        log();
        cuda.begin_capture().unwrap();
        launch(&cuda, &scale, 4, 0).unwrap();
        cuda.fill(memory, 1, 16).unwrap();
        cuda.load("good", "scale").unwrap();
        // The recording may use this memory whenever it runs.
        cuda.free(memory, 16);
        assert!(cuda.begin_capture().unwrap_err().to_string().contains("a recording is under way already"));
        std::thread::scope(|scope| {
            let other = || cuda.end_capture().err().unwrap().to_string();
            assert!(scope.spawn(other).join().unwrap().contains("only the thread that began the recording"));
        });
        let graph = cuda.end_capture().unwrap();
        assert_eq!(log(), format!("begin 1\nrecord {LAUNCHED}end\nforget\n"));
        graph.launch().unwrap();
        assert_eq!(log(), "run\nwait\n");
        assert_eq!(allocations(), alive);
        // What was recorded needs its modules: they stay as long as the recording.
        drop(cuda);
        assert_eq!(log(), "");
        drop(graph);
        assert!(log().starts_with("destroy\n"));
        assert_eq!(allocations(), 0);
    });
}

#[test]
fn what_cannot_be_recorded_is_refused() {
    in_child("what_cannot_be_recorded_is_refused", &[], || {
        let cuda = stand_in();
        let memory = cuda.allocate(16).unwrap();
        assert!(cuda.end_capture().err().unwrap().to_string().contains("no recording is under way"));
        let forbidden: [(&str, &dyn Fn() -> Result<()>); 5] = [
            ("allocate", &|| cuda.allocate(1).map(drop)),
            ("upload", &|| cuda.upload(&[1], memory)),
            ("download", &|| cuda.download(memory, &mut [0])),
            ("synchronize", &|| cuda.synchronize()),
            ("load", &|| cuda.load("good", "scale").map(drop)),
        ];
        for (name, call) in forbidden {
            cuda.begin_capture().unwrap();
            log();
            let error = call().unwrap_err().to_string();
            assert!(error.contains(&format!("{name}: cannot be recorded")), "{error}");
            assert_eq!(log(), "", "{name} never reaches the driver");
            let error = cuda.end_capture().err().unwrap().to_string();
            assert!(error.contains(&format!("{name} was called, which cannot be recorded")), "{error}");
            assert_eq!(log(), "end\nforget\n");
        }
        // Memory given back in a recording that failed is freed; then all is as before.
        cuda.begin_capture().unwrap();
        cuda.free(memory, 16);
        fail(c"cuGraphInstantiateWithFlags", 2);
        assert!(cuda.end_capture().is_err());
        assert_eq!(allocations(), 1, "the workspace");
        cuda.synchronize().unwrap();
    });
}

/// A product of `batch` matrices of small integers, by the driver and by its definition.
fn compare(cuda: &Cuda, shape: [usize; 4], transposed: [bool; 2], shared: [bool; 2], epilogue: Epilogue) {
    let [m, n, k, batch] = shape;
    let values = |count: usize, seed: usize| (0..count).map(|i| ((i * 7 + seed) % 11) as f32 - 5.0).collect::<Vec<_>>();
    let (a, b, bias) = (values(batch * m * k, 1), values(batch * k * n, 2), values(n, 3));
    let [stride_a, stride_b] = [if shared[0] { 0 } else { m * k }, if shared[1] { 0 } else { k * n }];
    let upload = |values: &[f32]| {
        let address = cuda.allocate(values.len() * f32::SIZE).unwrap();
        cuda.upload(bytemuck::cast_slice(values), address).unwrap();
        address
    };
    let product = MatrixProduct {
        dtype: DType::F32,
        m,
        n,
        k,
        batch,
        stride_a,
        stride_b,
        transpose_a: transposed[0],
        transpose_b: transposed[1],
        a: upload(&a),
        b: upload(&b),
        c: cuda.allocate(batch * m * n * f32::SIZE).unwrap(),
        bias: upload(&bias),
        epilogue,
    };
    // SAFETY: the memory was allocated and filled just above.
    assert!(unsafe { cuda.matrix_product(&product) }.unwrap());
    let mut got = vec![0f32; batch * m * n];
    cuda.download(product.c, bytemuck::cast_slice_mut(&mut got)).unwrap();
    let expected: Vec<f32> = (0..batch * m * n)
        .map(|index| {
            let (which, row, column) = (index / (m * n), index / n % m, index % n);
            let of_a = |j| a[which * stride_a + if transposed[0] { j * m + row } else { row * k + j }];
            let of_b = |j| b[which * stride_b + if transposed[1] { column * k + j } else { j * n + column }];
            let bias = if epilogue == Epilogue::Bias { bias[column] } else { 0.0 };
            (0..k).map(|j| of_a(j) * of_b(j)).sum::<f32>() + bias
        })
        .collect();
    assert_eq!(got, expected, "{shape:?} {transposed:?} {shared:?} {epilogue:?}");
}

/// An integer that the stand-in for cuBLASLt answers a question with.
fn ask(question: &str, operand: c_int) -> c_uint {
    // SAFETY: the stand-in has these functions; an argument that one does not take is passed in vain.
    unsafe { cublaslt::sys::culib().get::<unsafe extern "C" fn(c_int) -> c_uint>(question).unwrap()(operand) }
}

#[test]
fn products_of_rows_come_from_a_library_of_columns() {
    in_child("products_of_rows_come_from_a_library_of_columns", &[], || {
        let cuda = stand_in();
        for transposed in [[false, false], [true, false], [false, true], [true, true]] {
            for epilogue in [Epilogue::None, Epilogue::Bias] {
                compare(&cuda, [3, 4, 5, 1], transposed, [false; 2], epilogue);
                compare(&cuda, [1, 6, 2, 1], transposed, [false; 2], epilogue);
                compare(&cuda, [3, 2, 4, 3], transposed, [false, true], epilogue);
                compare(&cuda, [3, 2, 4, 3], transposed, [true, false], epilogue);
            }
        }
        // One plan for each of them, found again.
        assert_eq!(ask("stand_in_asked", 0), 32);
        compare(&cuda, [3, 4, 5, 1], [false; 2], [false; 2], Epilogue::Bias);
        assert_eq!(ask("stand_in_asked", 0), 32);
        assert_eq!(ask("stand_in_compute", 0), 68, "f32 is f32");
        assert_eq!(ask("stand_in_scheme", 0), 2, "sums that were split are added in f32, in a step of their own");
    });
}

#[test]
fn tf32_is_for_those_who_ask() {
    in_child("tf32_is_for_those_who_ask", &[("GRIDGRAD_TF32", "1")], || {
        compare(&stand_in(), [3, 4, 5, 1], [false; 2], [false; 2], Epilogue::None);
        assert_eq!(ask("stand_in_compute", 0), 77);
    });
}

fn small_product(cuda: &Cuda) -> MatrixProduct {
    let [a, b, c] = [(); 3].map(|()| cuda.allocate(64).unwrap());
    let bias = Address::NULL;
    let (stride_a, stride_b, transpose_a, transpose_b) = (4, 4, false, false);
    let (dtype, m, n, k, batch, epilogue) = (DType::F32, 2, 2, 2, 1, Epilogue::None);
    #[rustfmt::skip]
    let product = MatrixProduct {
        dtype, m, n, k, batch, stride_a, stride_b, transpose_a, transpose_b, a, b, c, bias, epilogue,
    };
    product
}

#[test]
fn products_that_are_not_the_librarys_are_left() {
    in_child("products_that_are_not_the_librarys_are_left", &[], || {
        let cuda = stand_in();
        let product = small_product(&cuda);
        // SAFETY (all): the memory is large enough for what is asked, or not used.
        let taken = |product: MatrixProduct| unsafe { cuda.matrix_product(&product) }.unwrap();
        assert!(taken(product));
        assert!(!taken(MatrixProduct { epilogue: Epilogue::BiasGelu, ..product }), "its GELU is not exact");
        assert!(!taken(MatrixProduct { dtype: DType::F64, ..product }));
        assert!(!taken(MatrixProduct { k: 0, ..product }));
        assert!(taken(MatrixProduct { m: 0, ..product }), "nothing to do is done");
        let asked = ask("stand_in_asked", 0);
        assert_eq!(asked, 1);
        // The heuristic has no answer for this one, and is asked once.
        for _ in 0..2 {
            assert!(!taken(MatrixProduct { dtype: DType::Bf16, ..product }));
        }
        assert_eq!(ask("stand_in_asked", 0), asked + 1);
        // The library's first factor is our second.
        assert!(taken(MatrixProduct {
            a: product.a.offset(4),
            b: product.b.offset(8),
            c: product.c.offset(16),
            ..product
        }));
        assert_eq!([0, 1, 2, 3].map(|operand| ask("stand_in_alignment", operand)), [8, 4, 16, 16]);
    });
}

#[test]
fn a_library_without_its_functions_is_none() {
    in_child_of(DRIVER, "int nothing;", "a_library_without_its_functions_is_none", &[], || {
        let cuda = stand_in();
        assert_eq!(allocations(), 0, "no workspace");
        // SAFETY: the memory is large enough for what is asked.
        assert!(!unsafe { cuda.matrix_product(&small_product(&cuda)) }.unwrap());
    });
}

#[test]
fn a_gpu_that_another_program_holds_is_unavailable() {
    in_child("a_gpu_that_another_program_holds_is_unavailable", &[], || {
        // SAFETY: the stand-in is on the loader's path.
        assert!(unsafe { driver::sys::is_culib_present() });
        fail(c"cuDevicePrimaryCtxRetain", 46);
        let error = Cuda::new(0).err().unwrap();
        assert!(matches!(error, Error::DeviceUnavailable { .. }), "{error:?}");
        assert!(error.to_string().contains("cuDevicePrimaryCtxRetain: CUDA_ERROR_DEVICE_UNAVAILABLE"), "{error}");
        assert!(Cuda::new(3).err().unwrap().to_string().contains("cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"));
    });
}

#[test]
fn a_driver_that_lacks_a_call_is_too_old() {
    let source = DRIVER.replace("int cuMemPoolTrimTo(", "int cuRenamed(");
    in_child_of(&source, CUBLASLT, "a_driver_that_lacks_a_call_is_too_old", &[], || {
        let error = Cuda::new(0).err().unwrap().to_string();
        assert_eq!(error, "cuda:0: the NVIDIA driver has no cuMemPoolTrimTo; install a newer one");
    });
}
