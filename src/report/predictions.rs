//! Pictures with the network's guesses beside the truth.

use std::path::Path;

use super::axis::percent;
use super::picture::{ImageView, Raster, fit_in_square};
use super::svg::{FAINT, Font, INK, MUTED, Svg, fit, number, wrap};
use crate::{Error, Result};

const OP: &str = "prediction_sheet";
const RIGHT: &str = "#15803d";
const WRONG: &str = "#b91c1c";
const UNKNOWN: &str = "#1d4ed8";

const MARGIN: f64 = 28.0;
const CARD_WIDTH: f64 = 196.0;
const GAP: f64 = 16.0;
const PADDING: f64 = 14.0;
const PICTURE: f64 = CARD_WIDTH - 2.0 * PADDING;
const MAX_COLUMNS: usize = 6;
/// Guesses shown per picture.
const GUESSES: usize = 3;
/// From the name of one guess to the name of the next, where the name takes one line.
const GUESS_HEIGHT: f64 = 37.0;
const LINE_HEIGHT: f64 = 16.0;
/// Long names of the first guess and of the truth get this many lines.
const NAME_LINES: usize = 3;
/// Room for the tick or the cross before the first guess.
const SIGN_WIDTH: f64 = 16.0;
const FIRST_FONT: Font = Font::new(13.0, INK).bold();
const OTHER_FONT: Font = Font::new(12.0, MUTED);

/// One picture, what it shows and what the network takes it for.
///
/// ```
/// use gridgrad::report::{ImageView, PredictionView, prediction_sheet};
/// let image = ImageView { height: 2, width: 2, channels: 1, pixels: &[0, 255, 255, 0] };
/// let top = vec![("stripe".to_owned(), 0.8), ("dot".to_owned(), 0.2)];
/// let folder = tempfile::tempdir().unwrap();
/// let views = [PredictionView { image, truth: Some("stripe"), top }];
/// prediction_sheet(folder.path().join("predictions.svg"), "Held-out images", &views)?;
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PredictionView<'a> {
    /// The picture.
    pub image: ImageView<'a>,
    /// Name of the true class, if known.
    pub truth: Option<&'a str>,
    /// Class names with their probabilities, 0 to 1, the most probable first. At least one; three are shown.
    pub top: Vec<(String, f32)>,
}

/// Draws a grid of pictures, each with the guesses of the network and their probabilities: green with a tick where
/// the first guess is the truth, red with a cross and the truth where not, blue where the truth is unknown.
///
/// # Errors
/// [`Error::Argument`] when there is no prediction, one without a guess, a probability outside 0 to 1, guesses not in
/// falling order, or an image whose pixels do not fit its shape; [`Error::Io`] when the file cannot be written.
pub fn prediction_sheet(path: impl AsRef<Path>, title: &str, predictions: &[PredictionView]) -> Result<()> {
    draw(title, predictions)?.write(path.as_ref())
}

pub(super) fn draw(title: &str, predictions: &[PredictionView]) -> Result<Svg> {
    check(predictions)?;
    let columns = columns(predictions.len());
    // Cards of one row are as tall as the tallest of them needs.
    let heights: Vec<f64> =
        predictions.chunks(columns).map(|row| row.iter().map(PredictionView::height).fold(0.0, f64::max)).collect();
    let width = 2.0 * MARGIN + columns as f64 * (CARD_WIDTH + GAP) - GAP;
    let heading = heading(title, predictions, width - 2.0 * MARGIN);
    let top = MARGIN + heading.iter().map(|(_, advance)| advance).sum::<f64>() + 8.0;
    let height = top + heights.iter().map(|h| h + GAP).sum::<f64>() - GAP + MARGIN;

    let mut svg = Svg::new(width, height, title);
    let mut y = MARGIN;
    for ((text, font), advance) in heading {
        y += advance;
        svg.text((MARGIN, y - 6.0), font, &text);
    }
    y = top;
    for (row, height) in predictions.chunks(columns).zip(heights) {
        for (column, prediction) in row.iter().enumerate() {
            let x = MARGIN + column as f64 * (CARD_WIDTH + GAP);
            prediction.draw(&mut svg, (x, y), height)?;
        }
        y += height + GAP;
    }
    Ok(svg)
}

fn columns(count: usize) -> usize {
    let square = (1.6 * count as f64).sqrt().ceil() as usize;
    square.clamp(count.min(3), MAX_COLUMNS)
}

fn check(predictions: &[PredictionView]) -> Result<()> {
    if predictions.is_empty() {
        return Err(Error::argument(OP, "got no predictions, expected at least one"));
    }
    for (index, prediction) in predictions.iter().enumerate() {
        let refuse = |message: String| Err(Error::argument(OP, format!("prediction {index}: {message}")));
        if prediction.top.is_empty() {
            return refuse("got no guess, expected at least one".into());
        }
        if let Some((name, p)) = prediction.top.iter().find(|(_, p)| !(0.0..=1.0).contains(p)) {
            return refuse(format!("got probability {p} for '{name}', expected 0 to 1"));
        }
        if prediction.top.windows(2).any(|pair| pair[0].1 < pair[1].1) {
            return refuse("got guesses out of order, expected the most probable first".into());
        }
    }
    Ok(())
}

/// Lines above the cards, each with its height: title, score, how to read a card.
fn heading(title: &str, predictions: &[PredictionView], width: f64) -> Vec<((String, Font), f64)> {
    let large = Font::new(20.0, INK).bold();
    let mut lines: Vec<_> =
        wrap(title, large, width).into_iter().map(|l| ((fit(&l, large, width), large), 26.0)).collect();
    let known = predictions.iter().filter(|p| p.truth.is_some()).count();
    let right = predictions.iter().filter(|p| p.verdict() == Verdict::Right).count();
    let score = if known > 0 { format!("{right} of {known} right. ") } else { String::new() };
    let text = format!("{score}Bars: how sure the network is of its first guesses.");
    let small = Font::new(13.0, MUTED);
    lines.extend(wrap(&text, small, width).into_iter().map(|line| ((line, small), 20.0)));
    lines
}

#[derive(Clone, Copy, PartialEq)]
enum Verdict {
    Right,
    Wrong,
    Unknown,
}

impl Verdict {
    fn colour(self) -> &'static str {
        match self {
            Verdict::Right => RIGHT,
            Verdict::Wrong => WRONG,
            Verdict::Unknown => UNKNOWN,
        }
    }

    /// A tick, a cross or nothing, so that colour isn't the only sign: an SVG path within 10 × 10 pixels.
    fn sign(self) -> Option<&'static str> {
        match self {
            Verdict::Right => Some("M0.5,5.5L3.8,9L9.5,1.5"),
            Verdict::Wrong => Some("M1,1L9,9M9,1L1,9"),
            Verdict::Unknown => None,
        }
    }
}

impl PredictionView<'_> {
    fn verdict(&self) -> Verdict {
        match (self.truth, self.top.first()) {
            (Some(truth), Some((guess, _))) if truth == guess => Verdict::Right,
            (Some(_), _) => Verdict::Wrong,
            (None, _) => Verdict::Unknown,
        }
    }

    /// The truth in words where the first guess misses it.
    fn truth_label(&self) -> Option<String> {
        self.truth.filter(|_| self.verdict() == Verdict::Wrong).map(|truth| format!("truth: {truth}"))
    }

    /// Lines that the name of the first guess takes.
    fn first_lines(&self) -> usize {
        let indent = if self.verdict().sign().is_some() { SIGN_WIDTH } else { 0.0 };
        self.top.first().map_or(1, |(name, _)| lines_of(name, PICTURE - indent))
    }

    /// Height of a card with room for the picture, the guesses and the truth.
    fn height(&self) -> f64 {
        let truth_lines = self.truth_label().map_or(0, |label| lines_of(&label, PICTURE));
        let text = GUESS_HEIGHT * self.top.len().min(GUESSES) as f64
            + LINE_HEIGHT * (self.first_lines() - 1 + truth_lines) as f64;
        2.0 * PADDING + PICTURE + 4.0 + text
    }

    fn draw(&self, svg: &mut Svg, (x, y): (f64, f64), height: f64) -> Result<()> {
        let verdict = self.verdict();
        let colour = verdict.colour();
        let border = format!(r##"rx="10" fill="#ffffff" stroke="{colour}" stroke-opacity="0.55" stroke-width="1.5""##);
        svg.rect([x, y, CARD_WIDTH, height], &border);

        let image = self.image.to_rgb(OP)?;
        let (width, tall) = fit_in_square(image.width(), image.height(), PICTURE);
        let place = [x + (CARD_WIDTH - width) / 2.0, y + PADDING + (PICTURE - tall) / 2.0, width, tall];
        svg.push(&Raster::from(&image).element(OP, place, "")?);

        let x = x + PADDING;
        let mut baseline = y + PADDING + PICTURE + 22.0;
        for (rank, guess) in self.top.iter().take(GUESSES).enumerate() {
            let (lines, verdict) = if rank == 0 { (self.first_lines(), Some(verdict)) } else { (1, None) };
            baseline = draw_guess(svg, (x, baseline), guess, lines, verdict);
        }
        if let Some(truth) = self.truth_label() {
            draw_lines(svg, (x, baseline), FIRST_FONT, &truth, PICTURE, NAME_LINES);
        }
        Ok(())
    }
}

fn lines_of(name: &str, width: f64) -> usize {
    wrap(name, FIRST_FONT, width).len().clamp(1, NAME_LINES)
}

/// A name of up to `lines` lines, then a bar with the probability; the first guess carries the verdict's colour and
/// sign. Returns the baseline of what follows.
fn draw_guess(svg: &mut Svg, (x, y): (f64, f64), guess: &(String, f32), lines: usize, verdict: Option<Verdict>) -> f64 {
    let (name, probability) = guess;
    let (font, colour) = match verdict {
        Some(verdict) => (Font { colour: verdict.colour(), ..FIRST_FONT }, verdict.colour()),
        None => (OTHER_FONT, MUTED),
    };
    if let Some(sign) = verdict.and_then(Verdict::sign) {
        let (left, top) = (number(x), number(y - 9.5));
        svg.push(&format!(
            r#"<path d="{sign}" transform="translate({left} {top})" fill="none" stroke="{colour}" stroke-width="2.2" stroke-linecap="round" stroke-linejoin="round"/>"#
        ));
    }
    let indent = if verdict.and_then(Verdict::sign).is_some() { SIGN_WIDTH } else { 0.0 };
    draw_lines(svg, (x + indent, y), font, name, PICTURE - indent, lines);
    let y = y + (lines - 1) as f64 * LINE_HEIGHT + 16.0;
    svg.text((x + PICTURE, y), Font { size: 11.5, ..font }.end(), &percent(f64::from(*probability), 1));
    let bar = PICTURE - 54.0;
    svg.rect([x, y - 7.0, bar, 5.0], &format!(r#"rx="2.5" fill="{FAINT}""#));
    let filled = bar * f64::from(*probability);
    if filled > 0.5 {
        svg.rect([x, y - 7.0, filled, 5.0], &format!(r#"rx="2.5" fill="{colour}""#));
    }
    y + GUESS_HEIGHT - 16.0
}

/// Text broken into at most `lines` lines; the last is cut where even that is too little.
fn draw_lines(svg: &mut Svg, (x, y): (f64, f64), font: Font, text: &str, width: f64, lines: usize) {
    let broken = wrap(text, font, width);
    for index in 0..lines.min(broken.len()) {
        let last = index + 1 == lines;
        let line = if last { broken[index..].join(" ") } else { broken[index].clone() };
        svg.text_within((x, y + index as f64 * LINE_HEIGHT), font, &line, width);
    }
}
