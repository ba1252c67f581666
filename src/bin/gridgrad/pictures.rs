//! The pictures of a finished run: sample predictions, and what attention heads look at.

use std::path::Path;

use gridgrad::Result;
use gridgrad::data::{Dataset, Image};
use gridgrad::models::crossformer::AttentionMap;
use gridgrad::random::Philox;
use gridgrad::report::{AttentionView, ImageView, PredictionView, attention_sheet, prediction_sheet};

use crate::checkpoint::Trained;

pub const PREDICTIONS: &str = "predictions.svg";
pub const ATTENTION: &str = "attention.svg";

/// Pictures on the sheet of predictions.
const SHOWN: usize = 24;
/// Tokens whose attention is shown, as shares of the map's height and width.
const QUERIES: [[f64; 2]; 2] = [[0.5, 0.5], [0.2, 0.7]];

/// Draws both sheets from held-out images into `folder`.
pub fn draw(trained: &Trained, held_out: &dyn Dataset, folder: &Path) -> Result<()> {
    let order = Philox::new(0).stream("pictures").permutation(held_out.len());
    let samples = order.iter().take(SHOWN).map(|&index| held_out.sample(index)).collect::<Result<Vec<_>>>()?;
    let Some((first, _)) = samples.first() else { return Ok(()) };
    let predictions =
        samples.iter().map(|(image, label)| prediction(trained, image, *label)).collect::<Result<Vec<_>>>()?;
    let title = format!("Held-out images of {}", held_out.name());
    prediction_sheet(folder.join(PREDICTIONS), &title, &predictions)?;
    let maps = trained.model.attention_maps(&trained.prepare(first.clone())?, &QUERIES)?;
    let views: Vec<AttentionView> = interesting(trained, &maps).into_iter().map(attention).collect();
    attention_sheet(folder.join(ATTENTION), "What attention heads look at", view(first), &views)
}

fn view(image: &Image) -> ImageView<'_> {
    ImageView { height: image.height(), width: image.width(), channels: image.channels(), pixels: image.pixels() }
}

fn prediction<'a>(trained: &'a Trained, image: &'a Image, label: usize) -> Result<PredictionView<'a>> {
    let ranked = trained.classify(image.clone())?;
    let top = ranked.iter().take(3).map(|&(class, p)| (trained.class(class).to_owned(), p)).collect();
    Ok(PredictionView { image: view(image), truth: Some(trained.class(label)), top })
}

/// The first short- and the first long-distance block of each stage, as far as there are some.
fn interesting<'a>(trained: &Trained, maps: &'a [AttentionMap]) -> Vec<&'a AttentionMap> {
    let stages = trained.model.config().stages();
    let first = |stage: usize, long: bool| {
        let of_kind = |map: &&AttentionMap| map.position.stage == stage && map.grouping.long_distance == long;
        let block = maps.iter().find(of_kind)?.position;
        Some(maps.iter().filter(move |map| map.position == block))
    };
    let kinds = (0..stages).flat_map(|stage| [(stage, false), (stage, true)]);
    kinds.filter_map(|(stage, long)| first(stage, long)).flatten().collect()
}

fn attention(map: &AttentionMap) -> AttentionView {
    let grouping = map.grouping.grouping;
    let [height, width] = map.map;
    let kind = match map.grouping.long_distance {
        true => format!("long distance (LDA), group {}, interval {}", grouping.group[0], grouping.interval[0]),
        false if grouping.group[0] >= height && grouping.group[1] >= width => "whole map (one group)".to_owned(),
        false => format!("short distance (SDA), group {}", grouping.group[0]),
    };
    AttentionView {
        title: format!("stage {}, block {}: {kind}", map.position.stage + 1, map.position.block + 1),
        query: (map.query[0], map.query[1]),
        map_height: height,
        map_width: width,
        heads: map.heads.clone(),
    }
}
