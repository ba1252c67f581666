//! `gridgrad info`: layers, parameters and multiply-adds.

use clap::Args;
use gridgrad::models::crossformer::{CrossFormer, CrossFormerConfig, Kind, StageCost};
use gridgrad::{DType, Error, Result};
use serde_json::json;

use crate::output::{print, print_json, table};

/// Shows a network's layers, parameters and multiply-adds.
#[derive(Args)]
pub struct Info {
    /// crossformer-tiny, -small, -base, -large, crossformer++-small, -base, -large, -huge (or their first letters),
    /// crossformer-micro, or a JSON file with a configuration
    model: String,
    /// Number of classes, for named models
    #[arg(long, default_value_t = 1000)]
    classes: usize,
    /// Side of the images, in pixels, for named models; the network's own where absent
    #[arg(long, value_name = "PIXELS")]
    image: Option<usize>,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
}

/// The configuration that a name on the command line stands for: `crossformer-s`, `small`, `crossformer++-b`, ….
pub fn named(name: &str, classes: usize) -> Result<CrossFormerConfig> {
    let (size, prefix) = match name.strip_prefix("crossformer") {
        Some(rest) if rest.starts_with("++") => (rest.trim_start_matches("++").trim_start_matches('-'), "++"),
        Some(rest) => (rest.trim_start_matches('-'), ""),
        None => (name.trim_start_matches("++").trim_start_matches('-'), if name.starts_with("++") { "++" } else { "" }),
    };
    let size = match size {
        "t" => "tiny",
        "s" => "small",
        "b" => "base",
        "l" => "large",
        "h" => "huge",
        other => other,
    };
    CrossFormerConfig::named(&format!("{prefix}{size}"), classes)
}

pub fn read_config(path: &str) -> Result<CrossFormerConfig> {
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
    // A list would pass for a configuration whose keys are all left out.
    if !bytes.trim_ascii_start().starts_with(b"{") {
        return Err(Error::format(path, "expected a JSON object"));
    }
    serde_json::from_slice(&bytes).map_err(|error| Error::format(path, error.to_string()))
}

pub fn run(info: &Info) -> Result<()> {
    let mut config =
        if info.model.ends_with(".json") { read_config(&info.model)? } else { named(&info.model, info.classes)? };
    if let Some(side) = info.image {
        config.img_size = [side, side];
    }
    // The values do not matter; half precision takes half the memory.
    let model = CrossFormer::new(config, 0, DType::Bf16)?;
    if info.json { print_json(&as_json(&model)?) } else { print(&as_text(&info.model, &model)?) }
}

fn as_json(model: &CrossFormer) -> Result<serde_json::Value> {
    let cost = model.cost()?;
    let part = |cost: &StageCost| json!({ "parameters": cost.parameters, "multiply_adds": cost.products, "published_flops": cost.published });
    Ok(json!({
        "config": model.config(),
        "embedding": part(&cost.embedding),
        "stages": cost.stages.iter().map(part).collect::<Vec<_>>(),
        "head": part(&cost.head),
        "total": part(&cost.total()),
    }))
}

fn as_text(name: &str, model: &CrossFormer) -> Result<String> {
    let (config, cost) = (model.config(), model.cost()?);
    let maps = config.stage_maps(config.img_size[0], config.img_size[1])?;
    let giga = |count: u64| format!("{:.3}", count as f64 / 1e9);
    let costs = |cost: &StageCost| [grouped(cost.parameters), giga(cost.products), giga(cost.published)];
    let row = |first: &str, middle: [String; 6], cost: &StageCost| -> Vec<String> {
        std::iter::once(first.to_owned()).chain(middle).chain(costs(cost)).collect()
    };
    let dash = || std::array::from_fn(|_| "–".to_owned());
    let heading =
        ["part", "map", "channels", "blocks", "heads", "group", "interval", "parameters", "GMAC", "GMAC (published)"];
    let mut rows = vec![heading.map(str::to_owned).to_vec(), row("patch embedding", dash(), &cost.embedding)];
    for (stage, [height, width]) in maps.iter().enumerate() {
        let middle = [
            format!("{height}×{width}"),
            config.channels(stage).to_string(),
            config.depths[stage].to_string(),
            config.num_heads[stage].to_string(),
            config.group_size[stage].to_string(),
            config.interval[stage].to_string(),
        ];
        rows.push(row(&format!("stage {}", stage + 1), middle, &cost.stages[stage]));
    }
    if config.kind == Kind::Classifier {
        rows.push(row("head", dash(), &cost.head));
    }
    rows.push(row("total", dash(), &cost.total()));
    let [height, width] = config.img_size;
    Ok(format!(
        "{name}: {height}×{width} pixels, {} channels, {} classes\n\n{}\n\
         One GMAC is 10⁹ multiply-adds for one image: of convolutions and matrix products, and by the counter behind the\n\
         published tables, which also counts layer norms and the position bias network but no amplitude cooling.\n",
        config.in_chans,
        config.num_classes,
        table(&rows)
    ))
}

/// 27776794 as 27,776,794.
pub fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let separator = |i: usize| if i > 0 && (digits.len() - i).is_multiple_of(3) { "," } else { "" };
    digits.chars().enumerate().map(|(i, digit)| format!("{}{digit}", separator(i))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_many_forms() {
        for name in ["crossformer-s", "crossformer-small", "small", "s"] {
            assert_eq!(named(name, 10).unwrap(), CrossFormerConfig::named("small", 10).unwrap(), "{name}");
        }
        for name in ["crossformer++-b", "++base", "crossformer++b", "++b"] {
            assert_eq!(named(name, 10).unwrap(), CrossFormerConfig::named("++base", 10).unwrap(), "{name}");
        }
        assert!(named("crossformer-", 10).is_err());
        assert_eq!((grouped(27_776_794), grouped(12)), ("27,776,794".into(), "12".into()));
    }
}
