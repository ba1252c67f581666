//! `gridgrad kernels`: what every GPU kernel takes of a multiprocessor, and what its launches move and compute.

use clap::Args;
use gridgrad::kernels::{Code, Kernel, MULTIPROCESSORS, all};
use gridgrad::{Error, Result, driver};
use serde_json::{Value, json};

use crate::output::{print, print_json, table};

/// Which kernels to list, and how.
#[derive(Args)]
pub struct KernelsArgs {
    /// Only kernels whose name or file begins so
    name: Option<String>,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &KernelsArgs) -> Result<()> {
    let mut kernels = all()?;
    if let Some(name) = &args.name {
        kernels.retain(|kernel| kernel.name.starts_with(name) || kernel.module.starts_with(name));
        if kernels.is_empty() {
            return Err(Error::Config(format!("no kernel and no file of kernels begins with '{name}'")));
        }
    }
    if args.json { print_json(&as_json(&kernels)) } else { print(&as_text(&kernels)) }
}

fn as_text(kernels: &[Kernel]) -> String {
    let mut text = String::from(
        "Registers of a thread, blocks of a multiprocessor, and the share of its threads that they are, for the largest\n\
         block that a kernel takes and its static shared memory. In formulas s is the bytes of an element.\n",
    );
    if !driver::kernels_built() {
        text += "This build has no GPU code: formulas alone.\n";
    }
    for kernel in kernels {
        let Kernel { module, name, cost, .. } = kernel;
        text += &format!("\n{name}  (kernels/{module}.cu)\n");
        text += &format!("  bytes {}\n  FLOPs {}\n", cost.bytes, cost.flops);
        if let Some(shared) = cost.shared {
            text += &format!("  dynamic shared memory {shared}\n");
        }
        let formulas = [Some(cost.bytes), Some(cost.flops), cost.shared];
        let names: Vec<&str> = formulas.into_iter().flatten().flat_map(|formula| formula.names()).collect();
        for (name, meaning) in kernel.names.iter().filter(|(name, _)| names.contains(name)) {
            text += &format!("    {name}: {meaning}\n");
        }
        if kernel.instances.iter().any(|instance| !instance.code.is_empty()) {
            let lines = table(&rows(kernel));
            text.extend(lines.lines().map(|line| format!("  {line}\n")));
        }
    }
    text
}

/// A line for each instance: threads and static shared memory, the most of all cards, then each card.
fn rows(kernel: &Kernel) -> Vec<Vec<String>> {
    let cards = MULTIPROCESSORS.map(|card| card.architecture);
    let heads = ["", "threads", "shared"].map(String::from);
    let mut rows = vec![heads.into_iter().chain(cards.map(|card| format!("sm_{card}"))).collect::<Vec<_>>()];
    for instance in &kernel.instances {
        let most = |of: fn(&Code) -> u32| instance.code.iter().map(of).max().unwrap_or(0).to_string();
        let mut row = vec![instance.name.clone(), most(|code| code.threads.unwrap_or(0)), most(|code| code.shared)];
        for card in cards {
            let code = instance.code.iter().find(|code| code.architecture == card);
            row.push(code.map_or("-".into(), cell));
        }
        rows.push(row);
    }
    rows
}

fn cell(code: &Code) -> String {
    match code.occupancy {
        Some(fit) => format!("{} {:>2} {:>3.0}%", code.registers, fit.blocks, 100.0 * fit.share),
        None => format!("{}  -    -", code.registers),
    }
}

fn as_json(kernels: &[Kernel]) -> Value {
    let code = |code: &Code| {
        json!({
            "architecture": code.architecture,
            "registers": code.registers,
            "shared_bytes": code.shared,
            "threads": code.threads,
            "blocks": code.occupancy.map(|fit| fit.blocks),
            "occupancy": code.occupancy.map(|fit| fit.share),
        })
    };
    let kernel = |kernel: &Kernel| {
        let instances = kernel.instances.iter().map(
            |instance| json!({ "name": instance.name, "code": instance.code.iter().map(code).collect::<Vec<_>>() }),
        );
        json!({
            "name": kernel.name,
            "module": kernel.module,
            "bytes": kernel.cost.bytes.text(),
            "flops": kernel.cost.flops.text(),
            "dynamic_shared_bytes": kernel.cost.shared.map(|shared| shared.text()),
            "names": kernel.names.iter().map(|&(name, meaning)| (name.into(), meaning.into())).collect::<serde_json::Map<_, Value>>(),
            "instances": instances.collect::<Vec<_>>(),
        })
    };
    json!({ "gpu_code": driver::kernels_built(), "kernels": kernels.iter().map(kernel).collect::<Vec<_>>() })
}
