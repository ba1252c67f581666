//! Predicts bytes, FLOPs and time of every kernel on an H200, by the formulas of the rooms, for the problems of
//! CrossFormer-T, -S, -B and -L at batch 1, 32 and 256. Nothing is run: these are not measurements.
//!
//! `cargo bench --bench roofline` prints Markdown, `-- --json` JSON.

#[allow(dead_code, reason = "the harness uses the rest")]
#[path = "gpu/model.rs"]
mod model;
#[allow(dead_code, reason = "the harness uses the rest")]
#[path = "gpu/shapes.rs"]
mod shapes;

use std::fmt::Write as _;
use std::io::Write as _;

use gridgrad::{DType, Result};
use model::{Direction, H200, launches};
use serde_json::{Value, json};

const DTYPE: DType = DType::Bf16;

fn main() -> Result<()> {
    let mut rows = Vec::new();
    for case in shapes::published()? {
        for direction in Direction::BOTH {
            let launches = launches(&case, direction, DTYPE)?;
            for launch in &launches {
                let [memory, arithmetic] = launch.times(H200, DTYPE);
                rows.push(json!({
                    "kernel": launch.kernel,
                    "problem": case.op.to_string(),
                    "models": case.models,
                    "batch": case.batch,
                    "bytes": launch.work.bytes,
                    "flops": launch.work.flops,
                    "microseconds": 1e6 * memory.max(arithmetic),
                    "bound_by": if memory >= arithmetic { "memory" } else { "arithmetic" },
                }));
            }
        }
    }
    if std::env::args().any(|argument| argument == "--json") {
        let roofs = json!({ "bytes_per_second": H200.bytes, "product_flops": H200.products, "f32_flops": H200.flops });
        let table = json!({ "prediction": true, "card": "H200", "roofs": roofs, "dtype": "bf16", "kernels": rows });
        print(&format!("{table:#}\n"));
        return Ok(());
    }
    let mut text = String::from(
        "Predictions of the static model, not measurements: H200 (4.3 TB/s, 790 TFLOP/s of products), bf16.\n\n",
    );
    text += "| kernel | problem | models | batch | MB | GFLOP | µs at least | bound by |\n";
    text += "|---|---|---|---:|---:|---:|---:|---|\n";
    for row in &rows {
        let number = |key: &str| row[key].as_f64().unwrap_or(0.0);
        let word = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {:.3} | {:.3} | {:.2} | {} |",
            word("kernel"),
            word("problem"),
            word("models"),
            row.get("batch").and_then(Value::as_u64).unwrap_or(0),
            number("bytes") / 1e6,
            number("flops") / 1e9,
            number("microseconds"),
            word("bound_by")
        );
    }
    print(&text);
    Ok(())
}

/// A reader that leaves early is no error.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}
