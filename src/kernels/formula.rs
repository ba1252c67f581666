//! Formulas over named extents, that can be both shown and computed.

use std::fmt;

use crate::{Error, Result};

/// A formula such as `2 rows width s + 12 rows`: sums, differences, products (by `*`, or side by side), quotients and
/// brackets over numbers and names.
///
/// ```
/// use gridgrad::kernels::Formula;
/// let bytes = Formula::new("2 rows width s + 12 rows");
/// assert_eq!(bytes.evaluate(&[("rows", 10.0), ("width", 96.0), ("s", 2.0)])?, 3960.0);
/// assert!(bytes.evaluate(&[("rows", 10.0)]).is_err());
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Formula(&'static str);

impl Formula {
    /// The formula that `text` writes out.
    pub const fn new(text: &'static str) -> Self {
        Formula(text)
    }

    /// The formula as written.
    pub fn text(self) -> &'static str {
        self.0
    }

    /// The names in it, in order, each once.
    pub fn names(self) -> Vec<&'static str> {
        let mut names = Vec::new();
        for word in self.0.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
            if word.starts_with(|c: char| c.is_ascii_alphabetic()) && !names.contains(&word) {
                names.push(word);
            }
        }
        names
    }

    /// Its value for these extents; those that it does not name are ignored.
    ///
    /// # Errors
    /// Where it names something else, or is no formula.
    pub fn evaluate(self, extents: &[(&str, f64)]) -> Result<f64> {
        let mut parser = Parser { rest: self.0, extents };
        let value = parser.sum().and_then(|value| match parser.next() {
            None => Ok(value),
            Some(rest) => Err(format!("'{rest}' is not expected")),
        });
        value.map_err(|reason| Error::Config(format!("formula '{}': {reason}", self.0)))
    }
}

impl fmt::Display for Formula {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.0)
    }
}

struct Parser<'a> {
    rest: &'a str,
    extents: &'a [(&'a str, f64)],
}

type Outcome = std::result::Result<f64, String>;

impl Parser<'_> {
    fn next(&mut self) -> Option<char> {
        self.rest = self.rest.trim_start();
        self.rest.chars().next()
    }

    fn take(&mut self, symbol: char) -> bool {
        let found = self.next() == Some(symbol);
        if found {
            self.rest = &self.rest[symbol.len_utf8()..];
        }
        found
    }

    fn sum(&mut self) -> Outcome {
        let mut value = self.product()?;
        loop {
            if self.take('+') {
                value += self.product()?;
            } else if self.take('-') {
                value -= self.product()?;
            } else {
                return Ok(value);
            }
        }
    }

    fn product(&mut self) -> Outcome {
        let mut value = self.factor()?;
        loop {
            if self.take('/') {
                value /= self.factor()?;
            } else if self.take('*') || self.next().is_some_and(|c| c == '(' || c.is_ascii_alphanumeric()) {
                value *= self.factor()?;
            } else {
                return Ok(value);
            }
        }
    }

    fn factor(&mut self) -> Outcome {
        if self.take('(') {
            let value = self.sum()?;
            return if self.take(')') { Ok(value) } else { Err("a bracket is not closed".into()) };
        }
        self.next();
        let is_name = self.rest.starts_with(|c: char| c.is_ascii_alphabetic());
        let belongs = |c: char| c.is_ascii_alphanumeric() || (is_name && c == '_') || (!is_name && c == '.');
        let (word, rest) = self.rest.split_at(self.rest.find(|c| !belongs(c)).unwrap_or(self.rest.len()));
        self.rest = rest;
        if is_name {
            let extent = self.extents.iter().find(|(name, _)| *name == word);
            extent.map(|&(_, value)| value).ok_or_else(|| format!("nothing is known of '{word}'"))
        } else {
            word.parse().map_err(|_| format!("'{word}{rest}' is neither a number nor a name"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &'static str) -> Result<f64> {
        Formula::new(text).evaluate(&[("a", 2.0), ("b_1", 3.0), ("long", 5.0)])
    }

    #[test]
    fn products_bind_more_than_sums_and_go_from_the_left() {
        for (text, expected) in [
            ("7", 7.0),
            ("1 + 2 a", 5.0),
            ("a b_1 long", 30.0),
            ("2 (a + b_1) long - 1", 49.0),
            ("long / a / a", 1.25),
            ("2*a*(1 - 0.5)", 2.0),
            ("10 - a - b_1", 5.0),
        ] {
            assert_eq!(value(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_formula_is_an_error() {
        for text in ["", "a +", "(a", "a)", "unknown", "2a", "1.2.3", "a ^ 2", "é"] {
            assert!(value(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_are_listed_once() {
        assert_eq!(Formula::new("2 a b_1 + a (1 + long)").names(), ["a", "b_1", "long"]);
    }
}
