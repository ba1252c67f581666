//! PyTorch on the same problems: `benches/pytorch/gpu_ops.py`, which reads them as JSON and answers with rows.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use gridgrad::{DType, Device, Error, Result};

use crate::report::Row;
use crate::shapes::Case;

pub fn measure(python: &Path, cases: &[Case], device: Device, dtype: DType, quick: bool) -> Result<Vec<Row>> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/pytorch/gpu_ops.py");
    let device = if matches!(device, Device::Cuda(_)) { device.to_string() } else { "cpu".into() };
    let problems: Vec<serde_json::Value> = cases
        .iter()
        .map(|case| {
            let mut problem = serde_json::to_value(case).map_err(|error| Error::Config(error.to_string()))?;
            problem["problem"] = format!("{}: {}", case.op.room(), case.op).into();
            Ok(problem)
        })
        .collect::<Result<_>>()?;
    let failed = |error: std::io::Error| Error::io(python, error);
    let mut child = Command::new(python)
        .args([script, "--device", &device, "--dtype", dtype.name()])
        .args(quick.then_some("--short"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(serde_json::Value::from(problems).to_string().as_bytes()).map_err(failed)?;
    }
    let output = child.wait_with_output().map_err(failed)?;
    if !output.status.success() {
        return Err(Error::Config(format!("{script} ended with {}", output.status)));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| Error::format(script, error.to_string()))
}
