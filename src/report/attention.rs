//! Where the heads of a transformer look.

use std::f64::consts::PI;
use std::path::Path;

use image::{ExtendedColorType, RgbImage};

use super::axis::{percent, significant};
use super::picture::{ImageView, Raster, fit_in_square};
use super::svg::{FAINT, Font, INK, MUTED, Svg, fit, number, wrap};
use crate::{Error, Result};

const OP: &str = "attention_sheet";
const MARGIN: f64 = 28.0;
const TILE: f64 = 128.0;
const GAP: f64 = 14.0;
/// Heads in one line; a row with more goes on below.
const HEADS_PER_LINE: usize = 8;
/// The legend needs this many tiles' width, however few heads there are.
const LEAST_TILES: usize = 5;
/// How much the heat covers the grey picture, of 255.
const COVER: u8 = 205;
/// How much white covers what lies outside the group, of 255.
const FADE: u8 = 190;

/// The attention of one query token, head by head, over one map of tokens.
///
/// ```
/// use gridgrad::report::{AttentionView, ImageView, attention_sheet};
/// let image = ImageView { height: 2, width: 2, channels: 1, pixels: &[0, 255, 255, 0] };
/// let view = AttentionView {
///     title: "stage 1, block 1".into(),
///     query: (0, 1),
///     map_height: 2,
///     map_width: 2,
///     heads: vec![vec![0.1, 0.2, 0.3, 0.4]],
/// };
/// let folder = tempfile::tempdir().unwrap();
/// attention_sheet(folder.path().join("attention.svg"), "What heads look at", image, &[view])?;
/// # Ok::<(), gridgrad::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct AttentionView {
    /// Which layer this is, such as `stage 1, block 0, short distance (SDA), group 4`.
    pub title: String,
    /// Row and column of the query token in the map.
    pub query: (usize, usize),
    /// Rows of tokens in the map.
    pub map_height: usize,
    /// Columns of tokens in the map.
    pub map_width: usize,
    /// For each head `map_height × map_width` weights, row by row; 0 for tokens outside the query's group.
    pub heads: Vec<Vec<f32>>,
}

/// Draws, for each of `rows`, the picture with the query token outlined and, for each head, the attention weights as
/// colours over the grey picture. Tokens outside the group are faded. Each head has its own scale, from 0 to its
/// largest weight, which is printed above it.
///
/// # Errors
/// [`Error::Argument`] when there is no row, a row without heads, a query outside the map, weights that do not fit the
/// map, are negative, not finite or all 0, or an image whose pixels do not fit its shape; [`Error::Io`] when the file
/// cannot be written.
pub fn attention_sheet(
    path: impl AsRef<Path>,
    title: &str,
    image: ImageView<'_>,
    rows: &[AttentionView],
) -> Result<()> {
    draw(title, image, rows)?.write(path.as_ref())
}

pub(super) fn draw(title: &str, image: ImageView<'_>, rows: &[AttentionView]) -> Result<Svg> {
    if rows.is_empty() {
        return Err(Error::argument(OP, "got no attention maps, expected at least one"));
    }
    rows.iter().try_for_each(AttentionView::check)?;
    let sheet = Sheet::new(image, rows)?;
    let large = Font::new(20.0, INK).bold();
    let small = Font::new(13.0, MUTED);
    let inner = sheet.width - 2.0 * MARGIN;
    let titles = wrap(title, large, inner);
    let how = wrap(HOW_TO_READ, small, inner);

    let top = MARGIN + 26.0 * titles.len() as f64 + 19.0 * how.len() as f64 + 10.0;
    let height = top + rows.iter().map(|row| sheet.row_height(row)).sum::<f64>() + LEGEND_HEIGHT + MARGIN;
    let mut svg = Svg::new(sheet.width, height, title);
    sheet.define_pictures(&mut svg)?;
    let mut y = MARGIN;
    for line in &titles {
        y += 26.0;
        svg.text((MARGIN, y - 6.0), large, &fit(line, large, inner));
    }
    for line in &how {
        y += 19.0;
        svg.text((MARGIN, y - 4.0), small, line);
    }
    y = top;
    for row in rows {
        sheet.draw_row(&mut svg, y, row)?;
        y += sheet.row_height(row);
    }
    draw_legend(&mut svg, y + 10.0)?;
    Ok(svg)
}

const HOW_TO_READ: &str = "The picture is cut into tokens, one per cell. Each map shows, for the outlined token, how \
    the head shares its attention among the tokens it can see; the shares add up to 100\u{a0}%.";

impl AttentionView {
    fn check(&self) -> Result<()> {
        let AttentionView { title, query: (row, column), map_height: height, map_width: width, heads } = self;
        let refuse = |message: String| Err(Error::argument(OP, format!("'{title}': {message}")));
        if row >= height || column >= width {
            return refuse(format!("got query ({row}, {column}), expected one inside the map of {height}×{width}"));
        }
        if heads.is_empty() {
            return refuse("got no heads, expected at least one".into());
        }
        for (index, weights) in heads.iter().enumerate() {
            if height.checked_mul(*width) != Some(weights.len()) {
                return refuse(format!("head {index} has {} weights, expected {height}×{width}", weights.len()));
            }
            if weights.iter().any(|w| !w.is_finite() || *w < 0.0) || weights.iter().all(|w| *w == 0.0) {
                return refuse(format!("head {index}: expected finite weights from 0 up, not all 0"));
            }
        }
        if u32::try_from(*height.max(width)).is_err() {
            return refuse(format!("a map of {height}×{width} is too large to draw"));
        }
        Ok(())
    }

    /// Tokens that some head gives weight to: the query's group.
    fn group(&self) -> Vec<bool> {
        (0..self.map_height * self.map_width).map(|i| self.heads.iter().any(|head| head[i] > 0.0)).collect()
    }
}

/// Sizes and pictures that all rows share.
struct Sheet {
    colour: RgbImage,
    grey: RgbImage,
    width: f64,
    tile: (f64, f64),
}

impl Sheet {
    fn new(image: ImageView<'_>, rows: &[AttentionView]) -> Result<Self> {
        let colour = image.to_rgb(OP)?;
        let mut grey = colour.clone();
        // Less contrast than the picture has: what shows through must not look like heat.
        for pixel in grey.pixels_mut() {
            let [r, g, b] = pixel.0.map(f64::from);
            pixel.0 = [(40.0 + 0.7 * (0.2126 * r + 0.7152 * g + 0.0722 * b)).round() as u8; 3];
        }
        let heads = rows.iter().map(|row| row.heads.len().min(HEADS_PER_LINE)).max().unwrap_or(1);
        let width = 2.0 * MARGIN + (1 + heads).max(LEAST_TILES) as f64 * (TILE + GAP) - GAP;
        let tile = fit_in_square(colour.width(), colour.height(), TILE);
        Ok(Sheet { colour, grey, width, tile })
    }

    fn row_height(&self, row: &AttentionView) -> f64 {
        let lines = row.heads.len().div_ceil(HEADS_PER_LINE) as f64;
        ROW_HEADING + lines * (self.tile.1 + TILE_HEADING + GAP) + 6.0
    }

    /// Both pictures once; the tiles refer to them.
    fn define_pictures(&self, svg: &mut Svg) -> Result<()> {
        let place = [0.0, 0.0, self.tile.0, self.tile.1];
        let colour = Raster::from(&self.colour).element(OP, place, r#" id="picture""#)?;
        let grey = Raster::from(&self.grey).element(OP, place, r#" id="grey""#)?;
        svg.push(&format!("<defs>{colour}\n{grey}</defs>"));
        Ok(())
    }

    fn draw_row(&self, svg: &mut Svg, y: f64, row: &AttentionView) -> Result<()> {
        let inner = self.width - 2.0 * MARGIN;
        svg.line((MARGIN, y), (self.width - MARGIN, y), &format!(r#"stroke="{FAINT}""#));
        svg.text_within((MARGIN, y + 24.0), Font::new(14.0, INK).bold(), &row.title, inner);
        let group = row.group();
        let size = group.iter().filter(|inside| **inside).count();
        let even = significant(100.0 / size as f64, 3);
        let (query_row, query_column) = row.query;
        let caption = format!(
            "token at row {query_row}, column {query_column} of {}×{}; it can see {size} tokens: an even share is {even}\u{a0}% each",
            row.map_height, row.map_width
        );
        svg.text_within((MARGIN, y + 42.0), Font::new(12.0, MUTED), &caption, inner);

        let label = Font::new(12.0, INK);
        let top = y + ROW_HEADING + TILE_HEADING;
        svg.text((MARGIN, top - 6.0), label, "the picture");
        self.draw_tile(svg, (MARGIN, top), "picture", None, row)?;
        for (head, weights) in row.heads.iter().enumerate() {
            let x = MARGIN + (1 + head % HEADS_PER_LINE) as f64 * (TILE + GAP);
            let top = top + (head / HEADS_PER_LINE) as f64 * (self.tile.1 + TILE_HEADING + GAP);
            let largest = weights.iter().fold(0.0_f32, |a, &w| a.max(w));
            svg.text((x, top - 6.0), label, &format!("head {head}"));
            let most = format!("max {}", percent(f64::from(largest), 1));
            svg.text((x + self.tile.0.max(110.0), top - 6.0), Font::new(11.0, MUTED).end(), &most);
            self.draw_tile(svg, (x, top), "grey", Some(heat_map(row, weights, largest, &group)), row)?;
        }
        Ok(())
    }

    fn draw_tile(
        &self,
        svg: &mut Svg,
        (x, y): (f64, f64),
        picture: &str,
        heat: Option<Raster<'_>>,
        row: &AttentionView,
    ) -> Result<()> {
        let (width, height) = self.tile;
        svg.push(&format!(r##"<use xlink:href="#{picture}" x="{}" y="{}"/>"##, number(x), number(y)));
        if let Some(heat) = heat {
            svg.push(&heat.element(OP, [x, y, width, height], "")?);
        }
        let (cell_width, cell_height) = (width / row.map_width as f64, height / row.map_height as f64);
        let cell = [x + row.query.1 as f64 * cell_width, y + row.query.0 as f64 * cell_height, cell_width, cell_height];
        outline(svg, cell);
        Ok(())
    }
}

const ROW_HEADING: f64 = 52.0;
const TILE_HEADING: f64 = 20.0;
const LEGEND_HEIGHT: f64 = 62.0;

/// White within black, so that it shows on any colour. Outside the cell, at least 5 pixels wide.
fn outline(svg: &mut Svg, [x, y, width, height]: [f64; 4]) {
    let grow = |size: f64| 0.75 + (5.0 - size).max(0.0) / 2.0;
    let (gx, gy) = (grow(width), grow(height));
    let cell = [x - gx, y - gy, width + 2.0 * gx, height + 2.0 * gy];
    svg.rect(cell, r##"fill="none" stroke="#000000" stroke-width="3.5" stroke-linejoin="round""##);
    svg.rect(cell, r##"fill="none" stroke="#ffffff" stroke-width="1.75" stroke-linejoin="round""##);
}

/// One pixel per token: its weight as a colour, or white outside the group.
fn heat_map(row: &AttentionView, weights: &[f32], largest: f32, group: &[bool]) -> Raster<'static> {
    let pixel = |(&weight, &inside): (&f32, &bool)| {
        let [r, g, b] = if inside { heat(f64::from(weight / largest)) } else { [255; 3] };
        [r, g, b, if inside { COVER } else { FADE }]
    };
    let pixels: Vec<u8> = weights.iter().zip(group).flat_map(pixel).collect();
    Raster {
        width: row.map_width as u32,
        height: row.map_height as u32,
        pixels: pixels.into(),
        kind: ExtendedColorType::Rgba8,
    }
}

fn draw_legend(svg: &mut Svg, y: f64) -> Result<()> {
    let font = Font::new(12.0, INK);
    let steps = 64;
    let pixels: Vec<u8> = (0..steps).flat_map(|i| heat(f64::from(i) / f64::from(steps - 1))).collect();
    let bar = Raster { width: steps, height: 1, pixels: pixels.into(), kind: ExtendedColorType::Rgb8 };
    svg.push(&bar.element(OP, [MARGIN, y + 10.0, 150.0, 14.0], "")?);
    svg.text((MARGIN, y + 40.0), font, "0");
    svg.text((MARGIN + 150.0, y + 40.0), font.end(), "the head's max");
    let x = MARGIN + 150.0 + 40.0;
    svg.rect([x, y + 10.0, 14.0, 14.0], r##"fill="#9ca3af""##);
    outline(svg, [x, y + 10.0, 14.0, 14.0]);
    svg.text((x + 26.0, y + 22.0), font, "the token that asks");
    let x = x + 190.0;
    svg.rect([x, y + 10.0, 14.0, 14.0], &format!(r##"fill="#f3f4f6" stroke="{MUTED}" stroke-width="0.75""##));
    svg.text((x + 26.0, y + 22.0), font, "outside its group: it can't look there");
    Ok(())
}

/// Dark violet over red to pale yellow for 0 to 1, in equal steps of perceived lightness (OKLCH, Ottosson 2020).
pub(super) fn heat(share: f64) -> [u8; 3] {
    let t = share.clamp(0.0, 1.0);
    let lightness = 0.24 + 0.72 * t;
    let hue = (290.0 + 180.0 * t) / 180.0 * PI;
    let mut chroma = 0.06 + 0.15 * (PI * t).sin();
    loop {
        let rgb = oklch_to_linear_rgb(lightness, chroma, hue);
        // Colours that a screen cannot show are paled until it can, which keeps their lightness.
        if chroma <= 0.0 || rgb.iter().all(|v| (0.0..=1.0).contains(v)) {
            return rgb.map(|v| (255.0 * gamma(v.clamp(0.0, 1.0))).round() as u8);
        }
        chroma -= 0.005;
    }
}

fn oklch_to_linear_rgb(lightness: f64, chroma: f64, hue: f64) -> [f64; 3] {
    let (a, b) = (chroma * hue.cos(), chroma * hue.sin());
    let l = (lightness + 0.396_337_777_4 * a + 0.215_803_757_3 * b).powi(3);
    let m = (lightness - 0.105_561_345_8 * a - 0.063_854_172_8 * b).powi(3);
    let s = (lightness - 0.089_484_177_5 * a - 1.291_485_548 * b).powi(3);
    [
        4.076_741_662_1 * l - 3.307_711_591_3 * m + 0.230_969_929_2 * s,
        -1.268_438_004_6 * l + 2.609_757_401_1 * m - 0.341_319_396_5 * s,
        -0.004_196_086_3 * l - 0.703_418_614_7 * m + 1.707_614_701 * s,
    ]
}

/// The sRGB transfer function.
fn gamma(linear: f64) -> f64 {
    if linear <= 0.003_130_8 { 12.92 * linear } else { 1.055 * linear.powf(1.0 / 2.4) - 0.055 }
}
