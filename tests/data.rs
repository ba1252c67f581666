//! Data sets, augmentation and batches, from the outside.

use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gridgrad::Error;
use gridgrad::data::augment::{Augment, Crop, Mixing, Normalise, RandAugment, RandomErasing};
use gridgrad::data::{self, AugmentConfig, Batch, Dataset, Image, InMemory, Loader, LoaderConfig, Pixels, Split};
use gridgrad::random::Philox;
use image::ImageFormat;
use proptest::prelude::*;

const TRAIN_IMAGES: &str = "train-images-idx3-ubyte";
const TRAIN_LABELS: &str = "train-labels-idx1-ubyte";
const SIGNS: &str = "Final_Training/Images/00000";
const CSV: &str = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n0.ppm;12;9;1;1;8;8;0\n";

fn idx_images(count: u8) -> Vec<u8> {
    let mut file = vec![0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 3, 0, 0, 0, 2];
    file.extend(0..count * 6);
    file
}

fn idx_labels(count: u8) -> Vec<u8> {
    let mut file = vec![0, 0, 8, 1, 0, 0, 0, count];
    file.extend((0..count).map(|i| i % 10));
    file
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn records(count: u8, label_bytes: usize) -> Vec<u8> {
    (0..count).flat_map(|i| std::iter::repeat_n(i % 10, label_bytes + 3072)).collect()
}

/// A small image of noise, encoded.
fn picture(format: ImageFormat) -> Vec<u8> {
    let stream = Philox::new(1);
    let image = image::RgbImage::from_fn(12, 9, |x, y| image::Rgb([stream.bits(u64::from(x * 9 + y)) as u8, 90, 7]));
    let mut file = Cursor::new(Vec::new());
    image.write_to(&mut file, format).unwrap();
    file.into_inner()
}

fn write(root: &Path, file: &str, bytes: &[u8]) {
    let path = root.join(file);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

fn open(root: &Path, split: Split) -> gridgrad::Result<Box<dyn Dataset>> {
    data::open(root.to_str().unwrap(), split, None)
}

/// Reads all of a set and checks that images and labels fit it.
fn read_all(root: &Path) -> gridgrad::Result<usize> {
    let set = open(root, Split::Train)?;
    for index in 0..set.len() {
        let (image, label) = set.sample(index)?;
        assert!(label < set.class_names().len());
        assert_eq!(image.channels(), set.channels());
        assert_eq!(image.pixels().len(), image.height() * image.width() * image.channels());
    }
    Ok(set.len())
}

/// A file of one format, where it lies in its set, and the other files that the set needs.
struct Case {
    target: String,
    sound: Vec<u8>,
    others: Vec<(String, Vec<u8>)>,
    /// Whether every shorter file is wrong.
    is_exact: bool,
}

impl Case {
    fn new(target: impl Into<String>, sound: Vec<u8>, is_exact: bool) -> Self {
        Case { target: target.into(), sound, others: Vec::new(), is_exact }
    }

    fn with(mut self, name: impl Into<String>, content: impl Into<Vec<u8>>) -> Self {
        self.others.push((name.into(), content.into()));
        self
    }

    /// The set, with `bytes` in place of the file.
    fn build(&self, bytes: &[u8]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, content) in &self.others {
            write(root.path(), name, content);
        }
        write(root.path(), &self.target, bytes);
        root
    }

    /// Reads the set with `bytes` in it; an error must be one about a damaged file.
    fn read(&self, bytes: &[u8]) -> Option<usize> {
        match read_all(self.build(bytes).path()) {
            Ok(count) => Some(count),
            Err(Error::Format { .. }) => None,
            Err(error) => panic!("{}: {error}", self.target),
        }
    }
}

fn cases() -> Vec<Case> {
    vec![
        Case::new(TRAIN_IMAGES, idx_images(3), true).with(TRAIN_LABELS, idx_labels(3)),
        Case::new(format!("{TRAIN_IMAGES}.gz"), gzip(&idx_images(3)), true).with(TRAIN_LABELS, idx_labels(3)),
        Case::new(TRAIN_LABELS, idx_labels(3), true).with(TRAIN_IMAGES, idx_images(3)),
        Case::new("data_batch_2.bin", records(2, 1), false),
        Case::new("train.bin", records(2, 2), false).with("fine_label_names.txt", "name\n".repeat(100)),
        Case::new("train.bin", records(2, 1), false).with("test_names.txt", "a\n"),
        Case::new(format!("{SIGNS}/GT-00000.csv"), CSV.into(), false)
            .with(format!("{SIGNS}/0.ppm"), picture(ImageFormat::Pnm)),
        Case::new("train/cat/1.jpg", picture(ImageFormat::Jpeg), true),
        Case::new("train/cat/1.png", picture(ImageFormat::Png), false),
        Case::new("train/cat/1.ppm", picture(ImageFormat::Pnm), true),
    ]
}

#[test]
fn sound_files_are_read() {
    for case in cases() {
        assert!(case.read(&case.sound) > Some(0), "{}", case.target);
    }
}

#[test]
fn every_truncation_is_an_error_or_a_smaller_set() {
    for case in cases() {
        // Long files are cut within their first and last bytes, and at some places between.
        let length = case.sound.len();
        for cut in (0..length).filter(|cut| *cut < 80 || length - cut < 24 || cut % 97 == 0) {
            let count = case.read(&case.sound[..cut]);
            assert!(count.is_none() || !case.is_exact, "{} cut at {cut} of {length} was read", case.target);
        }
    }
}

#[test]
fn trailing_bytes_are_an_error_where_the_length_is_known() {
    for case in cases().iter().filter(|case| case.target.contains("ubyte") || case.target.ends_with(".bin")) {
        assert_eq!(case.read(&[&case.sound[..], &[1]].concat()), None, "{}", case.target);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(which in 0..10_usize, bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
        cases()[which].read(&bytes);
    }

    #[test]
    fn flipped_bytes_never_panic(
        which in 0..10_usize,
        flips in prop::collection::vec((any::<prop::sample::Index>(), 1..=255_u8), 1..4),
        in_header in any::<bool>(),
    ) {
        let case = &cases()[which];
        let mut bytes = case.sound.clone();
        let reach = if in_header { bytes.len().min(32) } else { bytes.len() };
        for (at, flip) in flips {
            bytes[at.index(reach)] ^= flip;
        }
        case.read(&bytes);
    }

    #[test]
    fn damaged_images_never_panic(
        format in prop::sample::select(vec![ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::Pnm]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
    ) {
        let mut bytes = picture(format);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        match Image::decode(&bytes, Path::new("damaged")) {
            Ok(image) => prop_assert_eq!(image.pixels().len(), image.height() * image.width() * image.channels()),
            Err(error) => prop_assert!(matches!(error, Error::Format { .. }), "{}", error),
        }
    }

    #[test]
    fn any_image_survives_any_preset(
        (height, width) in (1..90_usize, 1..90_usize),
        channels in prop::sample::select(vec![1_usize, 3]),
        preset in prop::sample::select(vec!["imagenet", "digits", "small", "none"]),
        size in 1..40_usize,
        seed in any::<u64>(),
    ) {
        let stream = Philox::new(seed);
        let pixels = (0..height * width * channels).map(|i| stream.bits(i as u64) as u8).collect();
        let image = Image::new(height, width, channels, pixels).unwrap();
        let mut config = AugmentConfig::preset(preset).unwrap().with_image_size(size);
        if let Crop::Padded { padding } = &mut config.crop {
            *padding = size.min(4);
        }
        let augment = Augment::new(config, channels).unwrap();
        let mut out = vec![f32::NAN; augment.sample_len()];
        augment.training_sample(&image, &mut stream.draws(), &mut out).unwrap();
        prop_assert!(out.iter().all(|value| value.is_finite()));
        out.fill(f32::NAN);
        augment.test_sample(&image, &mut out).unwrap();
        prop_assert!(out.iter().all(|value| value.is_finite()));
    }
}

#[test]
fn counts_that_disagree_and_labels_out_of_range_are_errors() {
    let message = |images: &[u8], labels: &[u8]| {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "t10k-images.idx3-ubyte", images);
        write(root.path(), "t10k-labels.idx1-ubyte", labels);
        open(root.path(), Split::Test).err().unwrap().to_string()
    };
    assert!(message(&idx_images(3), &idx_labels(4)).contains("4 labels"));
    let mut labels = idx_labels(3);
    labels[9] = 10;
    let text = message(&idx_images(3), &labels);
    assert!(text.contains("at byte 9") && text.contains("label 10"), "{text}");
    assert!(message(&idx_labels(9), &idx_labels(9)).contains("magic"));
}

#[test]
fn signs_must_match_their_list() {
    let message = |csv: &str, files: &[&str]| {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), &format!("{SIGNS}/GT-00000.csv"), csv.as_bytes());
        for file in files {
            write(root.path(), &format!("{SIGNS}/{file}"), b"P5 1 1 255\n0");
        }
        open(root.path(), Split::Train).err().unwrap().to_string()
    };
    assert!(message(CSV, &[]).contains("lists 1 images, the folder has 0"));
    assert!(message(CSV, &["0.ppm", "1.ppm"]).contains("has 2"));
    assert!(message(CSV, &["1.ppm"]).contains("\"0.ppm\", which is not"));
    assert!(message(&CSV.replace(";0\n", ";3\n"), &["0.ppm"]).contains("class 3 in the folder of class 0"));
}

/// Everything random switched on.
fn full_config(workers: usize) -> LoaderConfig {
    let augment = AugmentConfig {
        rand_augment: Some(RandAugment::default()),
        erasing: Some(Default::default()),
        mixing: Some(Mixing::default()),
        label_smoothing: 0.1,
        ..AugmentConfig::digits()
    };
    LoaderConfig { batch_size: 100, drop_last: false, seed: 5, workers, augment, ..LoaderConfig::default() }
}

fn epoch(config: LoaderConfig, epoch: u64, start: usize) -> Vec<Batch> {
    let digits = Arc::from(data::open("builtin", Split::Train, None).unwrap());
    let loader = Loader::new(digits, config).unwrap();
    loader.epoch(epoch, start).collect::<gridgrad::Result<_>>().unwrap()
}

#[test]
fn batches_are_the_same_bits_for_any_number_of_workers() {
    let inline = epoch(full_config(0), 2, 0);
    assert_eq!(inline.len(), 15);
    for (workers, prefetch) in [(1, 0), (2, 1), (5, 8), (40, 4)] {
        assert!(epoch(LoaderConfig { prefetch, ..full_config(workers) }, 2, 0) == inline, "{workers} workers");
    }
}

#[test]
fn an_epoch_resumed_in_its_middle_continues_as_if_never_left() {
    let whole = epoch(full_config(0), 1, 0);
    for workers in [0, 3] {
        assert!(epoch(full_config(workers), 1, 6) == whole[6..]);
    }
}

#[test]
fn seeds_and_epochs_change_order_and_images() {
    let first = epoch(full_config(0), 0, 0);
    for other in [epoch(full_config(0), 1, 0), epoch(LoaderConfig { seed: 6, ..full_config(0) }, 0, 0)] {
        assert_ne!(first[0].indices, other[0].indices);
    }
    let ordered = LoaderConfig { shuffle: false, ..full_config(0) };
    let (zero, one) = (epoch(ordered.clone(), 0, 0), epoch(ordered, 1, 0));
    assert_eq!(zero[0].indices, one[0].indices);
    assert_ne!(zero[0].images, one[0].images);
}

#[test]
fn mixed_targets_sum_to_one_and_hold_both_labels() {
    for batch in epoch(full_config(2), 0, 0) {
        for (row, target) in batch.targets.chunks(10).enumerate() {
            assert!((target.iter().sum::<f32>() - 1.0).abs() < 1e-5);
            let (own, partner) = (batch.labels[row], batch.labels[batch.len() - 1 - row]);
            // Smoothing by 0.1 over 10 classes leaves 0.91 to a label, and 0.92 to two that share it.
            let (held, expected) =
                if own == partner { (target[own], 0.91) } else { (target[own] + target[partner], 0.92) };
            assert!((held - expected).abs() < 1e-5, "{held}");
        }
    }
}

#[test]
fn normalised_digits_have_zero_mean_and_unit_variance() {
    let plain = AugmentConfig::digits().with_image_size(8);
    let config = LoaderConfig { augment: plain, training: false, ..full_config(0) };
    let samples: Vec<f32> = epoch(config, 0, 0).into_iter().flat_map(|batch| batch.images.into_floats()).collect();
    let mean = samples.iter().sum::<f32>() / samples.len() as f32;
    let variance = samples.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / samples.len() as f32;
    assert!(mean.abs() < 0.01 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
}

#[test]
fn own_sets_can_be_held_in_memory() {
    let names = vec!["dark".to_string(), "light".to_string()];
    let set = InMemory::new("own", names, [2, 2, 3], [[0; 12], [255; 12]].concat(), vec![0, 1]).unwrap();
    let config = LoaderConfig { batch_size: 2, shuffle: false, ..LoaderConfig::default() };
    let batch = Loader::new(Arc::new(set), config).unwrap().epoch(0, 0).next().unwrap().unwrap();
    let floats = batch.floats();
    assert_eq!((floats[0], floats[floats.len() - 1]), (0.0, 1.0));
    assert_eq!(batch.images.len(), 2 * 32 * 32 * 3);
}

/// The folder with real sets, where the environment names one.
fn real_root() -> Option<PathBuf> {
    let root = std::env::var_os("GRIDGRAD_DATA").map(PathBuf::from);
    if root.is_none() {
        println!("skipped: GRIDGRAD_DATA is not set");
    }
    root
}

#[test]
fn real_sets_load() {
    let Some(root) = real_root() else { return };
    let sets = [
        ("mnist", [60_000, 10_000], 10, 1),
        ("cifar10", [3_500, 750], 10, 3),
        ("gtsrb", [7_842, 2_000], 43, 3),
        ("imagenette", [850, 200], 10, 3),
    ];
    for (name, counts, classes, channels) in sets {
        for (split, count) in [Split::Train, Split::Test].into_iter().zip(counts) {
            let set = data::open(name, split, Some(&root)).unwrap();
            assert_eq!((set.len(), set.class_names().len(), set.channels()), (count, classes, channels), "{name}");
            let mut seen = vec![0; classes];
            (0..set.len()).for_each(|index| seen[set.sample(index).unwrap().1] += 1);
            assert!(seen.iter().all(|&count| count > 0), "{name} {split:?}: {seen:?}");
            let measured = Normalise::measured(&*set, 1000).unwrap();
            let known = Normalise::for_set(name).unwrap();
            println!("{name} {split:?}: {count} samples, {measured:?}, of each class {seen:?}");
            // ImageNet's usual deviations are averages over images, below that of all pixels.
            let tolerance = if name == "imagenette" { 0.08 } else { 0.03 };
            for (got, expected) in measured.mean.iter().chain(&measured.std).zip(known.mean.iter().chain(&known.std)) {
                assert!((got - expected).abs() < tolerance, "{name} {split:?}: {measured:?}, expected about {known:?}");
            }
        }
    }
    for (split, count) in [(Split::Train, 688), (Split::Test, 258)] {
        let set = open(&root.join("gtsrb/GTSRB"), split).unwrap();
        assert_eq!((set.len(), set.class_names().len()), (count, 43));
        assert!((0..set.len()).all(|index| set.sample(index).is_ok()));
    }
}

#[test]
fn real_photographs_go_through_the_imagenet_recipe() {
    let Some(root) = real_root() else { return };
    let set: Arc<dyn Dataset> = Arc::from(data::open("imagenette", Split::Train, Some(&root)).unwrap());
    let config = LoaderConfig { batch_size: 16, augment: AugmentConfig::imagenet(), workers: 2, ..Default::default() };
    let loader = Loader::new(set, config).unwrap();
    for batch in loader.epoch(0, 0).take(4) {
        let batch = batch.unwrap();
        assert_eq!(batch.images.len(), 16 * 224 * 224 * 3);
        let floats = batch.floats();
        let mean = floats.iter().sum::<f32>() / floats.len() as f32;
        let variance = floats.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / floats.len() as f32;
        assert!(mean.abs() < 0.7 && (0.3..2.5).contains(&variance), "{mean} {variance}");
    }
}

/// Digits in batches of 50 with a recipe of the caller's.
fn batches_of(augment: AugmentConfig, training: bool, workers: usize) -> (Loader, Vec<Batch>) {
    let digits = Arc::from(data::open("builtin", Split::Test, None).unwrap());
    let config = LoaderConfig { batch_size: 50, workers, augment, training, shuffle: false, ..Default::default() };
    let loader = Loader::new(digits, config).unwrap();
    let batches = loader.epoch(2, 0).collect::<gridgrad::Result<_>>().unwrap();
    (loader, batches)
}

#[test]
fn batches_are_bytes_where_nothing_makes_floats_of_them() {
    let all = || AugmentConfig { colour_jitter: None, ..full_config(0).augment };
    let cutmix = Mixing { mixup: 0.0, ..Mixing::default() };
    let never = RandomErasing { probability: 0.0, ..RandomErasing::default() };
    let recipes = [
        (AugmentConfig::digits(), true),
        (AugmentConfig { erasing: None, mixing: None, ..all() }, true),
        (AugmentConfig { erasing: Some(never), mixing: Some(cutmix.clone()), ..all() }, true),
        (
            AugmentConfig { erasing: None, mixing: Some(Mixing { probability: 0.0, ..Mixing::default() }), ..all() },
            true,
        ),
        (AugmentConfig { erasing: None, ..all() }, false),
        (AugmentConfig { mixing: Some(cutmix), ..all() }, false),
        (
            AugmentConfig { erasing: None, mixing: Some(Mixing { probability: 0.1, ..Mixing::default() }), ..all() },
            false,
        ),
    ];
    for (recipe, bytes) in recipes {
        for workers in [0, 2] {
            let (_, trained) = batches_of(recipe.clone(), true, workers);
            assert!(trained.iter().all(|batch| batch.images.is_bytes() == bytes), "{recipe:?}");
            let (_, tested) = batches_of(recipe.clone(), false, workers);
            assert!(tested.iter().all(|batch| batch.images.is_bytes()), "{recipe:?}");
            assert!(trained.iter().all(|batch| batch.images.len() == 50 * 32 * 32), "{recipe:?}");
        }
    }
}

/// What a loader makes is what the functions of a recipe make of single samples, in floats all the way.
#[test]
fn bytes_stand_for_the_floats_of_each_sample() {
    let cutmix = Mixing { mixup: 0.0, ..Mixing::default() };
    for (augment, mixing) in [(AugmentConfig::digits(), None), (AugmentConfig::small(), Some(cutmix))] {
        let recipe = AugmentConfig { mixing, ..augment.with_image_size(17) };
        for training in [true, false] {
            let (loader, batches) = batches_of(recipe.clone(), training, 1);
            let sample = Augment::new(recipe.clone(), 1).unwrap();
            let stream = |name: &str| Philox::new(loader.config().seed).stream(name).fork(2);
            for (number, batch) in batches.iter().enumerate() {
                let mut expected = vec![f32::NAN; 50 * sample.sample_len()];
                for (out, &index) in expected.chunks_mut(sample.sample_len()).zip(&batch.indices) {
                    let (picture, _) = loader.dataset().sample(index).unwrap();
                    let mut draws = stream("augment").fork(index as u64).draws();
                    match training {
                        true => sample.training_sample(&picture, &mut draws, out).unwrap(),
                        false => sample.test_sample(&picture, out).unwrap(),
                    }
                }
                let mut expected = Pixels::Floats(expected);
                if let (true, Some(mixing)) = (training, &recipe.mixing) {
                    let mix = mixing.draw(17, 17, &mut stream("mix").fork(number as u64).draws());
                    mix.apply(&mut expected, [50, 17, 17, 1], &mut vec![0.0; 50 * 10]);
                }
                assert!(batch.images.is_bytes() && *batch.floats() == *expected.floats());
            }
        }
    }
}
