//! A small SVG writer: shapes, escaped text that fits.

use std::path::Path;

use crate::Result;
use crate::file::write_atomically;

/// Text and lines.
pub(super) const INK: &str = "#1f2937";
/// Captions and axis labels.
pub(super) const MUTED: &str = "#6b7280";
/// Grid lines and borders.
pub(super) const FAINT: &str = "#e5e7eb";

/// How a piece of text looks and which of its points sits at the given position.
#[derive(Clone, Copy)]
pub(super) struct Font {
    pub size: f64,
    pub colour: &'static str,
    pub bold: bool,
    pub anchor: &'static str,
}

impl Font {
    pub const fn new(size: f64, colour: &'static str) -> Self {
        Font { size, colour, bold: false, anchor: "start" }
    }

    pub const fn bold(self) -> Self {
        Font { bold: true, ..self }
    }

    pub const fn middle(self) -> Self {
        Font { anchor: "middle", ..self }
    }

    pub const fn end(self) -> Self {
        Font { anchor: "end", ..self }
    }
}

/// A drawing in the making; positions are in pixels from the top left.
pub(super) struct Svg {
    width: f64,
    height: f64,
    title: String,
    body: String,
}

impl Svg {
    pub fn new(width: f64, height: f64, title: &str) -> Self {
        Svg { width, height, title: escape(title), body: String::new() }
    }

    /// Adds an element that is markup already.
    pub fn push(&mut self, markup: &str) {
        self.body.push_str(markup);
        self.body.push('\n');
    }

    /// A rectangle; `style` holds further attributes.
    pub fn rect(&mut self, [x, y, width, height]: [f64; 4], style: &str) {
        let [x, y, width, height] = [x, y, width, height].map(number);
        self.push(&format!(r#"<rect x="{x}" y="{y}" width="{width}" height="{height}" {style}/>"#));
    }

    pub fn line(&mut self, from: (f64, f64), to: (f64, f64), style: &str) {
        let [x1, y1, x2, y2] = [from.0, from.1, to.0, to.1].map(number);
        self.push(&format!(r#"<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" {style}/>"#));
    }

    pub fn circle(&mut self, (x, y): (f64, f64), radius: f64, style: &str) {
        let [x, y, radius] = [x, y, radius].map(number);
        self.push(&format!(r#"<circle cx="{x}" cy="{y}" r="{radius}" {style}/>"#));
    }

    /// One line of text with its baseline at `y`.
    pub fn text(&mut self, (x, y): (f64, f64), font: Font, text: &str) {
        self.text_named((x, y), font, text, None);
    }

    /// One line of text cut to `width`; a reader who points at cut text sees all of it.
    pub fn text_within(&mut self, at: (f64, f64), font: Font, text: &str, width: f64) {
        let shown = fit(text, font, width);
        self.text_named(at, font, &shown, (shown != text).then_some(text));
    }

    fn text_named(&mut self, (x, y): (f64, f64), font: Font, text: &str, tooltip: Option<&str>) {
        let weight = if font.bold { r#" font-weight="600""# } else { "" };
        let anchor = if font.anchor == "start" { String::new() } else { format!(r#" text-anchor="{}""#, font.anchor) };
        let tooltip = tooltip.map(|t| format!("<title>{}</title>", escape(t))).unwrap_or_default();
        self.push(&format!(
            r#"<text x="{}" y="{}" font-size="{}" fill="{}"{weight}{anchor}>{tooltip}{}</text>"#,
            number(x),
            number(y),
            number(font.size),
            font.colour,
            escape(text)
        ));
    }

    /// The whole document.
    pub fn finish(&self) -> String {
        let [width, height] = [self.width, self.height].map(number);
        let fonts = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,'DejaVu Sans',sans-serif";
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" xmlns:xlink=\"http://www.w3.org/1999/xlink\" width=\"{width}\" \
             height=\"{height}\" viewBox=\"0 0 {width} {height}\" font-family=\"{fonts}\" role=\"img\">\n\
             <title>{}</title>\n<rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n{}</svg>\n",
            self.title, self.body
        )
    }

    /// Writes the document to `path`, through a temporary file of the same folder.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_atomically(path, self.finish().as_bytes())
    }
}

/// A length with at most two decimals and no trailing zeros.
pub(super) fn number(value: f64) -> String {
    let text = format!("{value:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// Text as XML: special characters escaped, those that XML 1.0 cannot hold replaced.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\t' | '\n' | '\r' => out.push(' '),
            '\0'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            _ => out.push(c),
        }
    }
    out
}

/// Width of `text` in pixels, estimated on the wide side: which font a viewer has is unknown.
pub(super) fn width_of(text: &str, font: Font) -> f64 {
    let em: f64 = text.chars().map(|c| em_width(c) * if font.bold { 1.13 } else { 1.0 }).sum();
    em * font.size
}

fn em_width(c: char) -> f64 {
    match c {
        'i' | 'j' | 'l' | 'I' | '.' | ',' | ':' | ';' | '\'' | '|' | '!' | ' ' => 0.33,
        'f' | 'r' | 't' | '(' | ')' | '-' | '/' => 0.41,
        'm' | 'w' | 'M' | 'W' | '@' | '%' | '…' => 0.95,
        'A'..='Z' => 0.71,
        '0'..='9' => 0.64,
        '\0'..='\u{7f}' => 0.62,
        '\u{80}'..='\u{10ff}' => 0.65,
        _ => 1.0,
    }
}

/// `text`, or as much of it as fits in `width` with an ellipsis.
pub(super) fn fit(text: &str, font: Font, width: f64) -> String {
    if width_of(text, font) <= width {
        return text.into();
    }
    let mut kept: String = text.into();
    while kept.pop().is_some() {
        let shortened = format!("{}…", kept.trim_end());
        if width_of(&shortened, font) <= width {
            return shortened;
        }
    }
    "…".into()
}

/// `text` broken at spaces into lines of at most `width`, unless a single word is wider.
pub(super) fn wrap(text: &str, font: Font, width: f64) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if width_of(&format!("{line} {word}"), font) <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.into()),
        }
    }
    lines
}
