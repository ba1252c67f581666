use smartcore::dataset::digits;

use super::attention::{draw as draw_attention, heat};
use super::curves::{draw as draw_curves, thin};
use super::picture::base64;
use super::predictions::draw as draw_predictions;
use super::svg::{Font, escape, fit, number, width_of, wrap};
use super::*;
use crate::random::Philox;

/// Checks that the text is one element, its tags balanced, attributes quoted and entities known.
fn check_xml(text: &str) -> Result<(), String> {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = text.trim_end();
    let mut roots = 0;
    while !rest.is_empty() {
        let (data, after) = rest.split_once('<').ok_or("text after the root")?;
        check_entities(data)?;
        if open.is_empty() && (!data.is_empty() || roots > 0) {
            return Err(format!("outside the root: {data:?}"));
        }
        let (tag, after) = after.split_once('>').ok_or("a tag that never ends")?;
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            if open.pop() != Some(name) {
                return Err(format!("</{name}> closes another element"));
            }
        } else {
            let (tag, empty) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
            let name = tag.split_whitespace().next().ok_or("a tag without a name")?;
            check_attributes(&tag[name.len()..])?;
            if !empty {
                open.push(name);
            }
        }
        roots += usize::from(open.is_empty());
    }
    if open.is_empty() && roots == 1 { Ok(()) } else { Err(format!("{roots} roots, never closed: {open:?}")) }
}

fn check_attributes(mut rest: &str) -> Result<(), String> {
    let mut names = std::collections::HashSet::new();
    while !rest.trim_start().is_empty() {
        let (name, value) = rest.split_once("=\"").ok_or(format!("no quoted value: {rest:?}"))?;
        if !name.starts_with(' ') || !names.insert(name.trim()) {
            return Err(format!("attribute {name:?} not apart or twice"));
        }
        let (value, after) = value.split_once('"').ok_or("a value that never ends")?;
        check_entities(value)?;
        rest = after;
    }
    Ok(())
}

fn check_entities(text: &str) -> Result<(), String> {
    for part in text.split('&').skip(1) {
        if !["amp;", "lt;", "gt;", "quot;", "#39;"].iter().any(|known| part.starts_with(known)) {
            return Err(format!("unknown entity &{part}"));
        }
    }
    text.chars().find(|c| c.is_control() && *c != '\n').map_or(Ok(()), |c| Err(format!("control character {c:?}")))
}

#[test]
fn the_checker_finds_what_is_wrong() {
    assert!(check_xml("<a x=\"1\"><b/>t&amp;<c></c></a>\n").is_ok());
    for bad in ["<a><b></a></b>", "<a>&x;</a>", "<a", "<a/><b/>", "<a x=1/>", "<a>\u{1}</a>", "<a><b></a>", ""] {
        assert!(check_xml(bad).is_err(), "{bad}");
    }
}

const NASTY: &str = "a <b> & \"c\" 'd' \u{1} ß 日本語 🐈";

fn digit(index: usize) -> (Vec<u8>, usize) {
    let data = digits::load_dataset();
    let pixels = data.data[64 * index..64 * (index + 1)].iter().map(|v| (v * 255.0 / 16.0) as u8).collect();
    (pixels, data.target[index] as usize)
}

fn view(pixels: &[u8]) -> ImageView<'_> {
    ImageView { height: 8, width: 8, channels: 1, pixels }
}

fn epoch(epoch: usize, loss: f64) -> EpochRecord {
    EpochRecord { epoch, train_loss: loss, ..Default::default() }
}

/// Curves shaped like those of a real run, with noise of a fixed seed.
fn run(epochs: usize, steps_per_epoch: usize) -> (Vec<EpochRecord>, Vec<StepRecord>) {
    let noise = Philox::new(5);
    let decay = |t: f64| 2.3 * (-6.0 * t / epochs as f64).exp();
    let records = (1..=epochs).map(|e| {
        let t = e as f64;
        let wobble = f64::from(noise.uniform(e as u64)) - 0.5;
        let held_out = decay(t) * (1.0 + 0.2 * wobble) + 0.08 + 0.1 * t / epochs as f64;
        EpochRecord {
            epoch: e,
            train_loss: decay(t) + 0.01,
            held_out_loss: Some(held_out),
            train_accuracy: Some(1.0 - 0.35 * decay(t)),
            held_out_accuracy: Some(1.0 - 0.35 * decay(t) - 0.015 - 0.01 * wobble),
        }
    });
    let steps = (0..epochs * steps_per_epoch).map(|s| {
        let t = s as f64 / steps_per_epoch as f64;
        let loss = (decay(t) + 0.01) * (0.5 + f64::from(noise.uniform(9000 + s as u64)));
        StepRecord { epoch: t, loss }
    });
    (records.collect(), steps.collect())
}

fn prediction<'a>(pixels: &'a [u8], truth: Option<&'a str>, guesses: &[(&str, f32)]) -> PredictionView<'a> {
    let top = guesses.iter().map(|(name, p)| (name.to_string(), *p)).collect();
    PredictionView { image: view(pixels), truth, top }
}

/// Attention by likeness of brightness, inside the group that `sees` allows.
fn attention(
    title: &str,
    pixels: &[u8],
    query: (usize, usize),
    heads: usize,
    sees: impl Fn(usize, usize) -> bool,
) -> AttentionView {
    let wanted = f32::from(pixels[query.0 * 8 + query.1]) / 255.0;
    let weights = |head: usize| {
        let raw: Vec<f32> = (0..64_usize)
            .map(|i| {
                let far = (i / 8).abs_diff(query.0) + (i % 8).abs_diff(query.1);
                let unlike = (f32::from(pixels[i]) / 255.0 - wanted).abs();
                let score = -4.0 * unlike - 0.15 * (head * far) as f32;
                if sees(i / 8, i % 8) { score.exp() } else { 0.0 }
            })
            .collect();
        let sum: f32 = raw.iter().sum();
        raw.iter().map(|w| w / sum).collect()
    };
    let heads = (0..heads).map(weights).collect();
    AttentionView { title: title.into(), query, map_height: 8, map_width: 8, heads }
}

#[test]
fn text_is_escaped() {
    assert_eq!(escape("<a & \"b\" 'c'>"), "&lt;a &amp; &quot;b&quot; &#39;c&#39;&gt;");
    assert_eq!(escape("ß日\t\u{0}\u{ffff}"), "ß日 \u{fffd}\u{fffd}");
}

#[test]
fn text_fits_where_it_is_put() {
    let font = Font::new(12.0, "#000000");
    let name = "no overtaking by vehicles over 3.5 tonnes";
    let cut = fit(name, font, 100.0);
    assert!(cut.ends_with('…') && cut.starts_with("no over") && width_of(&cut, font) <= 100.0, "{cut}");
    assert_eq!(fit("seven", font, 100.0), "seven");
    let lines = wrap(name, font, 100.0);
    assert!(lines.len() > 1 && lines.iter().all(|line| width_of(line, font) <= 100.0), "{lines:?}");
    assert_eq!(lines.join(" "), name);
}

#[test]
fn numbers_and_base64_match_their_definitions() {
    assert_eq!([0.0, -0.001, 1.5, 12.346, 100.0].map(number), ["0", "0", "1.5", "12.35", "100"]);
    let cases = ["", "f", "fo", "foo", "foob", "fooba", "foobar"].map(|text| base64(text.as_bytes()));
    assert_eq!(cases, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"]);
}

#[test]
fn heat_gets_lighter_in_even_steps() {
    let linear = |v: u8| (f64::from(v) / 255.0).powf(2.2);
    // CIE lightness, 0 to 100.
    let lightness =
        |[r, g, b]: [u8; 3]| 116.0 * (0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b)).cbrt() - 16.0;
    let values: Vec<f64> = (0..=20).map(|i| lightness(heat(f64::from(i) / 20.0))).collect();
    assert!(values[0] < 15.0 && values[20] > 90.0, "{values:?}");
    for pair in values.windows(2) {
        assert!((1.0..7.0).contains(&(pair[1] - pair[0])), "{values:?}");
    }
}

#[test]
fn embedded_pictures_decode_to_the_same_pixels() {
    let pixels: Vec<u8> = (0..60).collect();
    let rgb = ImageView { height: 4, width: 5, channels: 3, pixels: &pixels }.to_rgb("test").unwrap();
    assert_eq!(rgb.as_raw(), &pixels);
    let large = vec![7; 1000 * 10];
    let small = ImageView { height: 10, width: 1000, channels: 1, pixels: &large }.to_rgb("test").unwrap();
    assert_eq!(small.dimensions(), (320, 3));
    assert!(small.as_raw().iter().all(|v| *v == 7));
    for (height, width, channels) in [(4, 5, 4), (4, 4, 3), (0, 0, 3), (usize::MAX, 2, 1)] {
        assert!(ImageView { height, width, channels, pixels: &pixels }.to_rgb("test").is_err());
    }
}

#[test]
fn thinning_keeps_ends_extremes_and_gaps() {
    let mut points: Vec<(f64, f64)> = (0..100_000).map(|i| (f64::from(i), (f64::from(i) * 0.7).sin())).collect();
    points[4321].1 = 50.0;
    points[777].1 = f64::NAN;
    let kept = thin(&points);
    assert!(kept.len() < 1000, "{}", kept.len());
    assert_eq!((kept[0], kept[kept.len() - 1]), (points[0], points[99_999]));
    assert!(kept.contains(&points[4321]) && kept.iter().any(|p| p.1.is_nan()));
    assert!(kept.windows(2).all(|pair| pair[0].0 < pair[1].0));
}

#[test]
fn curves_of_any_length_are_well_formed() {
    for (epochs, steps_per_epoch) in [(1, 0), (1, 5), (2, 3), (30, 40), (3000, 2)] {
        let (epochs, steps) = run(epochs, steps_per_epoch);
        let text = draw_curves(NASTY, &epochs, &steps).unwrap().finish();
        check_xml(&text).unwrap();
        assert!(!text.contains("NaN") && !text.contains("inf") && text.len() < 200_000, "{}", text.len());
    }
}

#[test]
fn the_best_epoch_is_named() {
    let mut records = vec![epoch(1, 2.0), epoch(2, 1.0), epoch(3, 0.5)];
    for (record, (loss, accuracy)) in records.iter_mut().zip([(2.1, 0.3), (1.25, 0.7), (1.5, 0.9)]) {
        record.held_out_loss = Some(loss);
        record.held_out_accuracy = Some(accuracy);
    }
    let text = draw_curves("t", &records, &[]).unwrap().finish();
    assert!(text.contains("best 1.25, epoch 2") && text.contains("best 90.00\u{a0}%, epoch 3"), "{text}");
    assert!(!text.contains("not finite"));
}

#[test]
fn losses_that_are_no_numbers_leave_a_gap_and_a_note() {
    let records = [epoch(1, 2.0), epoch(2, f64::NAN), epoch(3, 1.0), epoch(4, f64::INFINITY), epoch(5, 3.0)];
    let text = draw_curves("t", &records, &[]).unwrap().finish();
    check_xml(&text).unwrap();
    assert!(text.contains("no finite loss at epoch 2 and 1 more") && !text.contains("NaN"), "{text}");
    let one_is_fine = draw_curves("t", &records[..1], &[]).unwrap().finish();
    assert!(!one_is_fine.contains("no finite loss"));
}

#[test]
fn curves_refuse_what_they_cannot_draw() {
    let wrong_share = EpochRecord { held_out_accuracy: Some(98.0), ..epoch(1, 1.0) };
    let step = |epoch| StepRecord { epoch, loss: 1.0 };
    assert!(draw_curves("t", &[], &[]).is_err());
    assert!(draw_curves("t", &[epoch(2, 1.0), epoch(2, 1.0)], &[]).is_err());
    assert!(draw_curves("t", &[epoch(1, f64::NAN)], &[]).is_err());
    assert!(draw_curves("t", &[wrong_share], &[]).is_err());
    assert!(draw_curves("t", &[epoch(1, 1.0)], &[step(1.0), step(0.5)]).is_err());
    assert!(draw_curves("t", &[epoch(1, 1.0)], &[step(f64::NAN)]).is_err());
}

#[test]
fn predictions_show_verdict_truth_and_score() {
    let (pixels, _) = digit(3);
    let sheet = [
        prediction(&pixels, Some("three"), &[("three", 0.984), ("five", 0.01)]),
        prediction(&pixels, Some(NASTY), &[("three", 0.6)]),
        prediction(&pixels, None, &[(NASTY, 0.5)]),
    ];
    let text = draw_predictions(NASTY, &sheet).unwrap().finish();
    check_xml(&text).unwrap();
    assert!(text.contains("1 of 2 right") && text.contains("98.4\u{a0}%"), "{text}");
    assert!(text.contains("truth: a &lt;b&gt;") && text.contains("image-rendering:pixelated"), "{text}");
    assert_eq!(text.matches("data:image/png;base64,iVBORw0KGgo").count(), 3);
    let without_truth = draw_predictions("t", &sheet[2..]).unwrap().finish();
    assert!(!without_truth.contains("right") && !without_truth.contains("truth:"));
}

#[test]
fn predictions_refuse_what_they_cannot_draw() {
    let (pixels, _) = digit(0);
    let refused = |p: PredictionView| draw_predictions("t", &[p]).is_err();
    assert!(draw_predictions("t", &[]).is_err());
    assert!(refused(prediction(&pixels, None, &[])));
    assert!(refused(prediction(&pixels, None, &[("a", f32::NAN)])));
    assert!(refused(prediction(&pixels, None, &[("a", 98.0)])));
    assert!(refused(prediction(&pixels, None, &[("a", 0.1), ("b", 0.2)])));
    assert!(refused(prediction(&pixels[1..], None, &[("a", 0.1)])));
}

#[test]
fn attention_counts_the_group_and_labels_heads() {
    let (pixels, _) = digit(3);
    let rows = [
        attention(NASTY, &pixels, (2, 5), 3, |row, column| row < 4 && column >= 4),
        attention("long", &pixels, (0, 0), 12, |row, column| row % 2 == 0 && column % 2 == 0),
    ];
    let text = draw_attention(NASTY, view(&pixels), &rows).unwrap().finish();
    check_xml(&text).unwrap();
    assert!(text.contains("it can see 16 tokens: an even share is 6.25\u{a0}% each"), "{text}");
    assert!(text.contains(">head 11<") && !text.contains(">head 12<"));
    // Two pictures, one legend, and one heat map per head; every use of a picture refers to one of the two.
    assert_eq!(text.matches("data:image/png").count(), 2 + 1 + 15);
    assert_eq!(text.matches("<use xlink:href=\"#grey\"").count(), 15);
}

#[test]
fn attention_refuses_what_it_cannot_draw() {
    let (pixels, _) = digit(3);
    let good = attention("t", &pixels, (2, 5), 2, |_, _| true);
    let refused = |change: &dyn Fn(&mut AttentionView)| {
        let mut row = good.clone();
        change(&mut row);
        draw_attention("t", view(&pixels), &[row]).is_err()
    };
    assert!(!refused(&|_| ()));
    assert!(draw_attention("t", view(&pixels), &[]).is_err());
    assert!(refused(&|row| row.query = (8, 0)));
    assert!(refused(&|row| row.heads.clear()));
    assert!(refused(&|row| row.heads[1].truncate(63)));
    assert!(refused(&|row| row.heads[1][5] = f32::NAN));
    assert!(refused(&|row| row.heads[1][5] = -0.1));
    assert!(refused(&|row| row.heads[1].fill(0.0)));
}

#[test]
fn drawings_are_the_same_every_time() {
    let (epochs, steps) = run(40, 10);
    let (pixels, _) = digit(7);
    let rows = [attention("t", &pixels, (2, 5), 2, |_, _| true)];
    let sheet = [prediction(&pixels, Some("seven"), &[("seven", 0.9)])];
    for _ in 0..2 {
        let twice = [(); 2].map(|()| {
            draw_curves("t", &epochs, &steps).unwrap().finish()
                + &draw_predictions("t", &sheet).unwrap().finish()
                + &draw_attention("t", view(&pixels), &rows).unwrap().finish()
        });
        assert_eq!(twice[0], twice[1]);
    }
}

#[test]
fn files_are_replaced_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("curves.svg");
    training_curves(&path, "first", &[epoch(1, 1.0)], &[]).unwrap();
    training_curves(&path, "second", &[epoch(1, 1.0)], &[]).unwrap();
    assert!(training_curves(&path, "third", &[], &[]).is_err());
    assert!(std::fs::read_to_string(&path).unwrap().contains(">second<"));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    let nowhere = folder.path().join("missing").join("curves.svg");
    let error = training_curves(&nowhere, "t", &[epoch(1, 1.0)], &[]).unwrap_err().to_string();
    assert!(error.contains("curves.svg"), "{error}");
}

/// Runs of every length, with gaps, long names and several heads. The results are made up, the digits are real.
#[test]
fn every_kind_of_picture_is_well_formed() {
    let kept = tempfile::tempdir().unwrap();
    let folder = kept.path();
    for (name, epochs, steps_per_epoch) in [("one", 1, 0), ("short", 12, 0), ("usual", 30, 60), ("long", 2500, 3)] {
        let (epochs, steps) = run(epochs, steps_per_epoch);
        let path = folder.join(format!("curves-{name}.svg"));
        training_curves(path, "Example curves (made-up values)", &epochs, &steps).unwrap();
    }
    let mut gaps = run(20, 0).0;
    gaps[6].train_loss = f64::NAN;
    gaps[7].held_out_loss = Some(f64::INFINITY);
    gaps.iter_mut().for_each(|e| (e.train_accuracy, e.held_out_accuracy) = (None, None));
    training_curves(folder.join("curves-gaps.svg"), "A run that went wrong", &gaps, &[]).unwrap();

    let classes = [
        "zero",
        "one",
        "two (a class with quite a long name)",
        "three",
        "four",
        "five",
        "six: no overtaking by vehicles over 3.5 tonnes",
        "seven",
        "eight",
        "nine & <more>",
    ];
    let samples: Vec<_> = (0..12).map(|i| digit(i * 17)).collect();
    let sheet: Vec<_> = samples
        .iter()
        .enumerate()
        .map(|(i, (pixels, label))| {
            let shift = usize::from(i % 4 == 2);
            let guess = |rank: usize| classes[(label + shift + 3 * rank) % 10];
            let p = 0.995 - 0.04 * i as f32;
            let guesses = [(guess(0), p), (guess(1), (1.0 - p) * 0.8), (guess(2), (1.0 - p) * 0.15)];
            prediction(pixels, (i != 11).then_some(classes[*label]), &guesses)
        })
        .collect();
    prediction_sheet(folder.join("predictions.svg"), "Example sheet: real digits, made-up guesses", &sheet).unwrap();
    prediction_sheet(folder.join("predictions-one.svg"), "A single picture with a title that must wrap", &sheet[2..3])
        .unwrap();

    let (pixels, _) = digit(13);
    let rows = [
        attention("stage 1, block 0, short distance (SDA), group 1", &pixels, (2, 5), 4, |r, c| r < 4 && c >= 4),
        attention("stage 1, block 1, long distance (LDA), interval 2", &pixels, (2, 4), 4, |r, c| {
            (r + c) % 2 == 0 && r % 2 == 0
        }),
        attention("stage 4, block 0, all tokens", &pixels, (4, 3), 12, |_, _| true),
    ];
    let title = "Example maps (attention by likeness of pixels)";
    attention_sheet(folder.join("attention.svg"), title, view(&pixels), &rows).unwrap();
    attention_sheet(
        folder.join("attention-two-heads.svg"),
        title,
        view(&pixels),
        &[attention("stage 1, block 0, short distance (SDA), group 1", &pixels, (2, 5), 2, |r, c| r < 4 && c >= 4)],
    )
    .unwrap();
    let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    assert_eq!(files.len(), 9);
    files.iter().for_each(|file| check_xml(&std::fs::read_to_string(file).unwrap()).unwrap());
}
