//! Loss and accuracy over the epochs.

use std::path::Path;

use super::axis::{Axis, percent, significant};
use super::svg::{FAINT, Font, INK, MUTED, Svg, number, width_of};
use crate::{Error, Result};

const OP: &str = "training_curves";
const TRAIN: &str = "#d97706";
const HELD_OUT: &str = "#1d4ed8";

const PANEL_WIDTH: f64 = 500.0;
const HEIGHT: f64 = 430.0;
const TOP: f64 = 122.0;
const BOTTOM: f64 = 62.0;
const LEFT: f64 = 72.0;
const RIGHT: f64 = 24.0;
/// Longer curves keep the least and the greatest value of each of this many stretches: what the eye can tell apart.
const STRETCHES: usize = 320;
/// Curves of up to this many points show each of them.
const DOTS: usize = 30;
/// Beyond this, a loss counts as not a number: it would flatten everything else, and overflows in `f32`.
const LARGEST: f64 = f32::MAX as f64;

/// What one epoch left behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct EpochRecord {
    /// Epochs completed, counted from 1 (0: before any training).
    pub epoch: usize,
    /// Mean loss over the training samples of the epoch.
    pub train_loss: f64,
    /// Mean loss on the held-out samples, if measured after this epoch.
    pub held_out_loss: Option<f64>,
    /// Share of training samples classified right, 0 to 1, if measured.
    pub train_accuracy: Option<f64>,
    /// Share of held-out samples classified right, 0 to 1, if measured.
    pub held_out_accuracy: Option<f64>,
}

/// The loss of one optimisation step.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct StepRecord {
    /// Epochs completed at this step, with a fraction: 1.5 is halfway through the second epoch.
    pub epoch: f64,
    /// Loss of the step's batch.
    pub loss: f64,
}

/// Draws loss and, where measured, accuracy over the epochs, side by side, with the best value of each marked.
///
/// `steps` may be empty; it is drawn faintly behind the loss per epoch. Losses that are not finite leave a gap and are
/// mentioned below the axis. A loss that spans a wide range gets a logarithmic axis.
///
/// # Errors
/// [`Error::Argument`] when there is no epoch, epochs or steps do not increase, no training loss is finite or an
/// accuracy is not between 0 and 1; [`Error::Io`] when the file cannot be written.
pub fn training_curves(
    path: impl AsRef<Path>,
    title: &str,
    epochs: &[EpochRecord],
    steps: &[StepRecord],
) -> Result<()> {
    draw(title, epochs, steps)?.write(path.as_ref())
}

pub(super) fn draw(title: &str, epochs: &[EpochRecord], steps: &[StepRecord]) -> Result<Svg> {
    check(epochs, steps)?;
    let mut panels = vec![loss_panel(epochs, steps)];
    panels.extend(accuracy_panel(epochs));
    let width = PANEL_WIDTH * panels.len() as f64;
    let mut svg = Svg::new(width, HEIGHT, title);
    svg.text_within((24.0, 38.0), Font::new(20.0, INK).bold(), title, width - 48.0);
    let first = steps.first().map_or(f64::INFINITY, |s| s.epoch).min(epochs[0].epoch as f64);
    let last = steps.last().map_or(0.0, |s| s.epoch).max(epochs[epochs.len() - 1].epoch as f64);
    let axis = Axis::epochs(first, last);
    for (index, panel) in panels.iter().enumerate() {
        panel.draw(&mut svg, PANEL_WIDTH * index as f64, &axis);
    }
    Ok(svg)
}

fn check(epochs: &[EpochRecord], steps: &[StepRecord]) -> Result<()> {
    let refuse = |message: String| Err(Error::argument(OP, message));
    if epochs.is_empty() {
        return refuse("got no epochs, expected at least one".into());
    }
    if let Some(pair) = epochs.windows(2).find(|pair| pair[0].epoch >= pair[1].epoch) {
        return refuse(format!("got epoch {} after epoch {}, expected increasing ones", pair[1].epoch, pair[0].epoch));
    }
    if let Some(step) = steps.iter().find(|s| !(0.0..LARGEST).contains(&s.epoch)) {
        return refuse(format!("got a step at epoch {}, expected a number from 0 up", step.epoch));
    }
    if let Some(pair) = steps.windows(2).find(|pair| pair[0].epoch > pair[1].epoch) {
        return refuse(format!("got a step at epoch {} after {}", pair[1].epoch, pair[0].epoch));
    }
    if !epochs.iter().any(|e| is_number(e.train_loss)) {
        return refuse("no training loss is a finite number".into());
    }
    let mut shares = epochs.iter().flat_map(|e| [e.train_accuracy, e.held_out_accuracy]).flatten();
    if let Some(share) = shares.find(|share| !(0.0..=1.0).contains(share)) {
        return refuse(format!("got an accuracy of {share}, expected a share from 0 to 1"));
    }
    Ok(())
}

fn is_number(value: f64) -> bool {
    value.abs() < LARGEST
}

/// One curve: (epoch, value) pairs, where a value that is not a number breaks the line.
struct Curve {
    name: &'static str,
    colour: &'static str,
    points: Vec<(f64, f64)>,
}

impl Curve {
    fn new(
        name: &'static str,
        colour: &'static str,
        epochs: &[EpochRecord],
        value: impl Fn(&EpochRecord) -> Option<f64>,
    ) -> Option<Self> {
        let points: Vec<_> = epochs.iter().filter_map(|e| Some((e.epoch as f64, value(e)?))).collect();
        points.iter().any(|p| is_number(p.1)).then_some(Curve { name, colour, points })
    }

    fn numbers(&self) -> impl Iterator<Item = (f64, f64)> {
        self.points.iter().copied().filter(|p| is_number(p.1))
    }
}

struct Panel {
    title: String,
    axis: Axis,
    label: fn(f64) -> String,
    curves: Vec<Curve>,
    steps: Vec<(f64, f64)>,
    /// Where the best value is, and what to say about it.
    best: Option<((f64, f64), String)>,
    note: Option<String>,
}

fn loss_panel(epochs: &[EpochRecord], steps: &[StepRecord]) -> Panel {
    let curves: Vec<Curve> = [
        Curve::new("training", TRAIN, epochs, |e| Some(e.train_loss)),
        Curve::new("held-out", HELD_OUT, epochs, |e| e.held_out_loss),
    ]
    .into_iter()
    .flatten()
    .collect();
    let steps: Vec<_> = steps.iter().map(|s| (s.epoch, s.loss)).collect();
    let (mut min, mut max) = range(curves.iter().flat_map(Curve::numbers).map(|p| p.1));
    // A few wild steps must not squeeze the curves: the middle 96 % of the steps are sure to fit.
    let mut sorted: Vec<f64> = steps.iter().map(|s| s.1).filter(|v| is_number(*v)).collect();
    sorted.sort_by(f64::total_cmp);
    if let (Some(low), Some(high)) = (sorted.get(sorted.len() / 50), sorted.get(sorted.len() * 49 / 50)) {
        (min, max) = (min.min(*low), max.max(*high));
    }
    let axis = Axis::loss(min, max);
    let best = best(curves.last(), |new, old| new < old, |v| significant(v, 3));
    let note = note_of_gaps(epochs);
    let scale = if axis.logarithmic { ", log scale" } else { "" };
    let title = format!("Loss (lower is better{scale})");
    Panel { title, axis, label: |v| significant(v, 3), curves, steps, best, note }
}

fn accuracy_panel(epochs: &[EpochRecord]) -> Option<Panel> {
    let curves: Vec<Curve> = [
        Curve::new("training", TRAIN, epochs, |e| e.train_accuracy),
        Curve::new("held-out", HELD_OUT, epochs, |e| e.held_out_accuracy),
    ]
    .into_iter()
    .flatten()
    .collect();
    let best = best(curves.last(), |new, old| new > old, |v| percent(v, 2))?;
    let (min, max) = range(curves.iter().flat_map(Curve::numbers).map(|p| p.1));
    Some(Panel {
        title: "Accuracy (higher is better)".into(),
        axis: Axis::share(min, max),
        label: |v| format!("{}\u{a0}%", significant(100.0 * v, 3)),
        curves,
        steps: Vec::new(),
        best: Some(best),
        note: None,
    })
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(min, max), v| (min.min(v), max.max(v)))
}

/// The first best point of the curve that matters: held-out where there is one.
fn best(curve: Option<&Curve>, better: fn(f64, f64) -> bool, label: fn(f64) -> String) -> Option<((f64, f64), String)> {
    let point = curve?.numbers().reduce(|old, new| if better(new.1, old.1) { new } else { old })?;
    Some((point, format!("best {}, epoch {}", label(point.1), point.0)))
}

fn note_of_gaps(epochs: &[EpochRecord]) -> Option<String> {
    let gap = |e: &&EpochRecord| !is_number(e.train_loss) || e.held_out_loss.is_some_and(|v| !is_number(v));
    let first = epochs.iter().find(gap)?.epoch;
    let more = match epochs.iter().filter(gap).count() - 1 {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Some(format!("no finite loss at epoch {first}{more}"))
}

impl Panel {
    fn draw(&self, svg: &mut Svg, offset: f64, epochs: &Axis) {
        let (left, right) = (offset + LEFT, offset + PANEL_WIDTH - RIGHT);
        let place = |(x, y): (f64, f64)| {
            (
                left + (right - left) * epochs.position(x),
                HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * self.axis.position(y),
            )
        };
        svg.text((offset + 24.0, 74.0), Font::new(14.0, INK).bold(), &self.title);
        self.draw_legend(svg, offset + 24.0);
        self.draw_grid(svg, (left, right), epochs, &place);
        svg.push(&path(&thin(&self.steps), TRAIN, r#"stroke-width="1" opacity="0.28""#, &place));
        for curve in &self.curves {
            svg.push(&path(&thin(&curve.points), curve.colour, r#"stroke-width="2.25""#, &place));
            if curve.points.len() <= DOTS {
                let style = format!(r#"fill="{}""#, curve.colour);
                curve.numbers().for_each(|point| svg.circle(place(point), 2.75, &style));
            }
        }
        if let (Some((point, _)), Some(curve)) = (&self.best, self.curves.last()) {
            let at = place(*point);
            let style = format!(r#"stroke="{}" stroke-width="1" stroke-dasharray="2 4" opacity="0.7""#, curve.colour);
            svg.line(at, (at.0, HEIGHT - BOTTOM), &style);
            svg.circle(at, 6.0, &format!(r##"fill="#ffffff" stroke="{}" stroke-width="2.5""##, curve.colour));
        }
        let caption = Font::new(12.0, MUTED);
        svg.text(((left + right) / 2.0, HEIGHT - 22.0), caption.middle(), "epoch");
        if let Some(note) = &self.note {
            svg.text((right, HEIGHT - 7.0), Font::new(11.0, "#b91c1c").end(), note);
        }
    }

    fn draw_legend(&self, svg: &mut Svg, mut x: f64) {
        let font = Font::new(12.0, INK);
        let y = 99.0;
        let mut entry = |svg: &mut Svg, text: &str| {
            svg.text((x + 28.0, y), font, text);
            let start = x;
            x += 28.0 + width_of(text, font) + 14.0;
            start
        };
        if !self.steps.is_empty() {
            let x = entry(svg, "each step");
            svg.line((x, y - 4.0), (x + 22.0, y - 4.0), &format!(r#"stroke="{TRAIN}" opacity="0.4""#));
        }
        for curve in &self.curves {
            let x = entry(svg, curve.name);
            let style = format!(r#"stroke="{}" stroke-width="2.5" stroke-linecap="round""#, curve.colour);
            svg.line((x, y - 4.0), (x + 22.0, y - 4.0), &style);
        }
        if let (Some((_, label)), Some(curve)) = (&self.best, self.curves.last()) {
            let x = entry(svg, label);
            let style = format!(r#"fill="none" stroke="{}" stroke-width="2.5""#, curve.colour);
            svg.circle((x + 15.0, y - 4.0), 5.0, &style);
        }
    }

    fn draw_grid(
        &self,
        svg: &mut Svg,
        (left, right): (f64, f64),
        epochs: &Axis,
        place: &dyn Fn((f64, f64)) -> (f64, f64),
    ) {
        let font = Font::new(11.5, MUTED);
        for value in self.axis.ticks(5.0) {
            let y = place((0.0, value)).1;
            svg.line((left, y), (right, y), &format!(r#"stroke="{FAINT}""#));
            svg.text((left - 10.0, y + 4.0), font.end(), &(self.label)(value));
        }
        let floor = HEIGHT - BOTTOM;
        svg.line((left, floor), (right, floor), &format!(r#"stroke="{MUTED}""#));
        for epoch in epochs.whole_ticks(8.0) {
            let x = place((epoch, 0.0)).0;
            svg.line((x, floor), (x, floor + 4.0), &format!(r#"stroke="{MUTED}""#));
            svg.text((x, floor + 18.0), font.middle(), &significant(epoch, 15));
        }
    }
}

/// A `<path>` through the points, interrupted where a value is not a number; a lone point shows as a dot.
pub(super) fn path(
    points: &[(f64, f64)],
    colour: &str,
    style: &str,
    place: &dyn Fn((f64, f64)) -> (f64, f64),
) -> String {
    let mut data = String::new();
    let mut pen_down = false;
    for &point in points {
        if is_number(point.1) {
            let (x, y) = place(point);
            let [x, y] = [x, y].map(number);
            data += &if pen_down { format!("L{x},{y}") } else { format!("M{x},{y}h0") };
        }
        pen_down = is_number(point.1);
    }
    if data.is_empty() {
        return data;
    }
    format!(
        r#"<path d="{data}" fill="none" stroke="{colour}" stroke-linejoin="round" stroke-linecap="round" {style}/>"#
    )
}

/// The points, or for a long curve the first, the last, and the extremes of each stretch, in order.
pub(super) fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= 2 * STRETCHES {
        return points.to_vec();
    }
    let mut kept = vec![0, points.len() - 1];
    for stretch in 0..STRETCHES {
        let bounds = [stretch, stretch + 1].map(|s| s * points.len() / STRETCHES);
        let by_value = |&a: &usize, &b: &usize| points[a].1.total_cmp(&points[b].1);
        let inside = || bounds[0]..bounds[1];
        let finite = || inside().filter(|&i| is_number(points[i].1));
        kept.extend(finite().min_by(by_value));
        kept.extend(finite().max_by(by_value));
        kept.extend(inside().find(|&i| !is_number(points[i].1)));
    }
    kept.sort_unstable();
    kept.dedup();
    kept.into_iter().map(|index| points[index]).collect()
}
