//! Certified accuracy by size of attack.

use std::path::Path;

use super::axis::{Axis, percent, significant};
use super::curves::{path, thin};
use super::svg::{FAINT, Font, INK, MUTED, Svg};
use crate::{Error, Result};

const OP: &str = "certified_curves";
const COLOURS: [&str; 6] = ["#1d4ed8", "#d97706", "#047857", "#be185d", "#6d28d9", "#57534e"];

const WIDTH: f64 = 720.0;
const PLOT_HEIGHT: f64 = 300.0;
const LEFT: f64 = 72.0;
const RIGHT: f64 = 28.0;
const BOTTOM: f64 = 58.0;
const LINE: f64 = 20.0;
const TOP: f64 = 84.0;

/// One ensemble's certified fractions.
#[derive(Clone, Copy, Debug)]
pub struct CertifiedCurve<'a> {
    /// What the legend calls it.
    pub name: &'a str,
    /// For sizes from 0 on, the share of samples that are certified at that size, 0 to 1; 0 beyond the last.
    pub fractions: &'a [f64],
}

/// Draws the certified fraction of one or more ensembles over the number of poisoned samples, with the size up to which
/// at least half is certified in the legend.
///
/// # Errors
/// [`Error::Argument`] when there is no curve, more than 6, an empty one, or a fraction that is not between 0 and 1;
/// [`Error::Io`] when the file cannot be written.
///
/// ```
/// use gridgrad::report::{CertifiedCurve, certified_curves};
/// let folder = tempfile::tempdir().unwrap();
/// let curves = [CertifiedCurve { name: "fa", fractions: &[0.9, 0.8, 0.4] }];
/// certified_curves(folder.path().join("certified.svg"), "Digits", &curves)?;
/// # Ok::<(), gridgrad::Error>(())
/// ```
pub fn certified_curves(path: impl AsRef<Path>, title: &str, curves: &[CertifiedCurve<'_>]) -> Result<()> {
    draw(title, curves)?.write(path.as_ref())
}

fn draw(title: &str, curves: &[CertifiedCurve<'_>]) -> Result<Svg> {
    check(curves)?;
    let top = TOP + LINE * curves.len() as f64;
    let height = top + PLOT_HEIGHT + BOTTOM;
    let mut svg = Svg::new(WIDTH, height, title);
    svg.text_within((24.0, 38.0), Font::new(20.0, INK).bold(), title, WIDTH - 48.0);
    let subtitle = "Share of samples classified right, whatever an attacker does (higher is better)";
    svg.text((24.0, 64.0), Font::new(13.0, MUTED), subtitle);
    let longest = curves.iter().map(|curve| curve.fractions.len()).max().unwrap_or(1);
    let (sizes, shares) = (Axis::epochs(0.0, longest as f64), Axis::linear(0.0, 1.0));
    let place = |(x, y): (f64, f64)| {
        (LEFT + (WIDTH - LEFT - RIGHT) * sizes.position(x), top + PLOT_HEIGHT * (1.0 - shares.position(y)))
    };
    draw_grid(&mut svg, &sizes, &shares, &place);
    for (index, curve) in curves.iter().enumerate() {
        let colour = COLOURS[index];
        let mut points: Vec<(f64, f64)> =
            curve.fractions.iter().enumerate().map(|(size, &share)| (size as f64, share)).collect();
        points.push((curve.fractions.len() as f64, 0.0));
        svg.push(&path(&thin(&points), colour, r#"stroke-width="2.25""#, &place));
        let y = TOP + LINE * (index as f64 + 0.5);
        svg.line((24.0, y - 4.0), (46.0, y - 4.0), &format!(r#"stroke="{colour}" stroke-width="2.5""#));
        svg.text_within((56.0, y), Font::new(12.5, INK), &legend(curve), WIDTH - 80.0);
    }
    Ok(svg)
}

fn check(curves: &[CertifiedCurve<'_>]) -> Result<()> {
    if curves.is_empty() || curves.len() > COLOURS.len() {
        return Err(Error::argument(OP, format!("got {} curves, expected 1 to {}", curves.len(), COLOURS.len())));
    }
    for CertifiedCurve { name, fractions } in curves {
        if fractions.is_empty() {
            return Err(Error::argument(OP, format!("{name}: got no fractions, expected at least one")));
        }
        if let Some(share) = fractions.iter().find(|share| !(0.0..=1.0).contains(*share)) {
            return Err(Error::argument(OP, format!("{name}: got a fraction of {share}, expected 0 to 1")));
        }
    }
    Ok(())
}

fn legend(curve: &CertifiedCurve<'_>) -> String {
    let clean = percent(curve.fractions[0], 2);
    match curve.fractions.iter().filter(|share| **share >= 0.5).count() {
        0 => format!("{}: {clean} without poison", curve.name),
        sizes => format!("{}: {clean} without poison, at least half up to {} poisoned samples", curve.name, sizes - 1),
    }
}

fn draw_grid(svg: &mut Svg, sizes: &Axis, shares: &Axis, place: &dyn Fn((f64, f64)) -> (f64, f64)) {
    let font = Font::new(11.5, MUTED);
    for share in shares.ticks(5.0) {
        let y = place((0.0, share)).1;
        svg.line((LEFT, y), (WIDTH - RIGHT, y), &format!(r#"stroke="{FAINT}""#));
        svg.text((LEFT - 10.0, y + 4.0), font.end(), &percent(share, 0));
    }
    let floor = place((0.0, 0.0)).1;
    svg.line((LEFT, floor), (WIDTH - RIGHT, floor), &format!(r#"stroke="{MUTED}""#));
    for size in sizes.whole_ticks(8.0) {
        let x = place((size, 0.0)).0;
        svg.line((x, floor), (x, floor + 4.0), &format!(r#"stroke="{MUTED}""#));
        svg.text((x, floor + 18.0), font.middle(), &significant(size, 15));
    }
    let caption = "samples inserted into the training set or deleted from it";
    svg.text(((LEFT + WIDTH - RIGHT) / 2.0, floor + 42.0), Font::new(12.0, MUTED).middle(), caption);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_drawn_and_named() {
        fn curve<'a>(name: &'a str, fractions: &'a [f64]) -> CertifiedCurve<'a> {
            CertifiedCurve { name, fractions }
        }
        let text = draw("A <title>", &[curve("fa", &[0.9, 0.7, 0.5, 0.1]), curve("dpa", &[0.4])]).unwrap().finish();
        assert!(text.contains("A &lt;title&gt;") && text.contains("up to 2 poisoned samples"), "{text}");
        assert_eq!(text.matches("<path").count(), 2);
        let refused = |curves: &[CertifiedCurve<'_>]| draw("", curves).err().unwrap().to_string();
        assert!(refused(&[]).contains("0 curves"));
        assert!(refused(&[curve("x", &[])]).contains("no fractions"));
        for share in [f64::NAN, -0.1, 1.5] {
            assert!(refused(&[curve("x", &[share])]).contains("expected 0 to 1"));
        }
    }
}
