//! Axes: where a value sits, which values get a label, how numbers read.

/// Ratio of largest to smallest value from which equal factors, not equal differences, get equal space.
const LOG_FROM_RATIO: f64 = 50.0;

/// Maps values to positions from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Axis {
    min: f64,
    max: f64,
    pub logarithmic: bool,
}

impl Axis {
    /// An axis for values from `min` to `max`, both finite, widened to round numbers.
    pub fn linear(min: f64, max: f64) -> Self {
        let (min, max) = widen(min, max);
        let step = round_step((max - min) / 4.0);
        Axis { min: (min / step).floor() * step, max: (max / step).ceil() * step, logarithmic: false }
    }

    /// An axis for a loss: logarithmic where positive values span a large ratio.
    pub fn loss(min: f64, max: f64) -> Self {
        if min > 0.0 && max / min > LOG_FROM_RATIO {
            return Axis { min: min / 1.15, max: max * 1.15, logarithmic: true };
        }
        Axis::linear(if min >= 0.0 && min < 0.4 * max { 0.0 } else { min }, max)
    }

    /// An axis for shares from 0 to 1 that never shows more than 100 %.
    pub fn share(min: f64, max: f64) -> Self {
        let axis = Axis::linear((min - 0.02).max(0.0), max);
        Axis { max: axis.max.min(1.0), ..axis }
    }

    /// An axis for epochs, without rounding: the curve fills the width.
    pub fn epochs(first: f64, last: f64) -> Self {
        let (min, max) = if first < last { (first, last) } else { (first - 0.5, first + 0.5) };
        Axis { min, max, logarithmic: false }
    }

    /// Where `value` sits, from 0 at the low end to 1 at the high end; values beyond sit at the end.
    pub fn position(&self, value: f64) -> f64 {
        let place = if self.logarithmic {
            (value.max(f64::MIN_POSITIVE) / self.min).ln() / (self.max / self.min).ln()
        } else {
            (value - self.min) / (self.max - self.min)
        };
        place.clamp(0.0, 1.0)
    }

    /// About `wanted` round values along the axis, in order.
    pub fn ticks(&self, wanted: f64) -> Vec<f64> {
        if self.logarithmic {
            return self.log_ticks(wanted);
        }
        self.multiples(round_step((self.max - self.min) / wanted))
    }

    /// Like `ticks`, but whole numbers only.
    pub fn whole_ticks(&self, wanted: f64) -> Vec<f64> {
        self.multiples(round_step((self.max - self.min) / wanted).max(1.0))
    }

    fn multiples(&self, step: f64) -> Vec<f64> {
        let slack = 1e-9 * (self.max - self.min);
        let first = ((self.min - slack) / step).ceil() as i64;
        let last = ((self.max + slack) / step).floor() as i64;
        (first..=last).map(|k| k as f64 * step).collect()
    }

    /// The densest of: 1, 2, 5 of each decade; 1 of each; 1 of every few, that stays near `wanted`.
    fn log_ticks(&self, wanted: f64) -> Vec<f64> {
        let decades = self.min.log10().floor() as i32..=self.max.log10().ceil() as i32;
        let inside = |v: &f64| (self.min..=self.max).contains(v);
        let all = |mantissas: &[f64]| -> Vec<f64> {
            decades.clone().flat_map(|d| mantissas.iter().map(move |m| m * 10f64.powi(d))).filter(inside).collect()
        };
        let (dense, sparse) = (all(&[1.0, 2.0, 5.0]), all(&[1.0]));
        if dense.len() as f64 <= 1.6 * wanted {
            return dense;
        }
        let every = (sparse.len() as f64 / (1.6 * wanted)).ceil().max(1.0) as usize;
        sparse.into_iter().step_by(every).collect()
    }
}

/// A range with room in it, even around a single value.
fn widen(min: f64, max: f64) -> (f64, f64) {
    let room = 1e-3 * min.abs().max(max.abs()).max(1e-9);
    if max - min > room { (min, max) } else { (min - room, max + room) }
}

/// The smallest of 1, 2, 5 × a power of ten that is no less than `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= step * (1.0 - 1e-9)).unwrap_or(10.0 * power)
}

/// A number with at most `digits` significant digits, as short as it reads.
pub(super) fn significant(value: f64, digits: usize) -> String {
    if value == 0.0 {
        return "0".into();
    }
    let exponent = value.abs().log10().floor() as i32;
    if !(-4..6).contains(&exponent) {
        let text = format!("{value:.*e}", digits.saturating_sub(1));
        let (mantissa, power) = text.split_once('e').unwrap_or((&text, "0"));
        return format!("{}e{power}", trim(mantissa));
    }
    let decimals = (digits as i32 - 1 - exponent).max(0) as usize;
    trim(&format!("{value:.decimals$}")).into()
}

fn trim(number: &str) -> &str {
    if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { number }
}

/// A share as a percentage with `decimals` decimals: `98.4 %`, with a space that doesn't break.
pub(super) fn percent(share: f64, decimals: usize) -> String {
    format!("{:.decimals$}\u{a0}%", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_axes_end_at_round_numbers() {
        let axis = Axis::linear(0.13, 2.31);
        assert_eq!(axis.ticks(5.0).len(), 4);
        assert_eq!((axis.position(0.0), axis.position(3.0)), (0.0, 1.0));
        assert_eq!(axis.position(1.5), 0.5);
    }

    #[test]
    fn a_single_value_sits_inside_its_axis() {
        for value in [-3.0, 0.0, 1e-12, 0.5, 1e9] {
            let place = Axis::linear(value, value).position(value);
            assert!((0.05..=0.95).contains(&place), "{value}: {place}");
        }
        assert_eq!(Axis::epochs(4.0, 4.0).position(4.0), 0.5);
    }

    #[test]
    fn wide_positive_losses_are_logarithmic() {
        let axis = Axis::loss(0.001, 2.3);
        assert!(axis.logarithmic && !Axis::loss(-1.0, 90.0).logarithmic && !Axis::loss(1.0, 20.0).logarithmic);
        let ticks = axis.ticks(5.0);
        assert!((3..=8).contains(&ticks.len()), "{ticks:?}");
        assert!(axis.position(0.0) == 0.0 && axis.position(9.0) == 1.0);
    }

    #[test]
    fn shares_stop_at_all_and_epochs_are_whole() {
        assert!(Axis::share(0.9, 1.0).ticks(5.0).iter().all(|t| (0.8..=1.0).contains(t)));
        assert_eq!(Axis::epochs(1.0, 3.0).whole_ticks(8.0), [1.0, 2.0, 3.0]);
    }

    #[test]
    fn numbers_read_short() {
        let read = |v| significant(v, 3);
        assert_eq!([0.0, 2.0, 0.05214, 123.4, 1234.0].map(read), ["0", "2", "0.0521", "123", "1234"]);
        assert_eq!([1.5e-7, -2.5e9].map(read), ["1.5e-7", "-2.5e9"]);
        assert_eq!(percent(0.98425, 1), "98.4\u{a0}%");
    }
}
