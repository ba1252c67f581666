//! `gridgrad train`: from images to a checkpoint.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::{Args, Subcommand, value_parser};
use gridgrad::data::{self, AugmentConfig, Dataset, Loader, LoaderConfig, Split};
use gridgrad::models::crossformer::Kind;
use gridgrad::models::{CrossFormer, CrossFormerConfig};
use gridgrad::train::{
    BEST_CHECKPOINT, Decay, LAST_CHECKPOINT, METRICS_FILE, Outcome, Precision, ScheduleConfig, Span, TrainConfig,
    Trainer, TrainingRun, Warmup,
};
use gridgrad::{DType, Device, Error, Result};
use serde::de::DeserializeOwned;

use crate::checkpoint::{Description, Trained};
use crate::device::DeviceFlag;
use crate::finite_aggregation::{TrainBagging, TrainDpa, TrainFiniteAggregation, TrainRandomSubsets};
use crate::info::{grouped, named};
use crate::output::{complain, print};
use crate::progress::{CURVES, Display, human, peak_memory};
use crate::settings::{self, Settings};
use crate::{pictures, settings::File};

const CONFIG_FILE: &str = "config.toml";

/// What to train.
#[derive(Subcommand)]
pub enum Train {
    /// An image classifier with cross-scale embeddings and long/short-distance attention.
    ///
    /// Without any option it trains a small network on handwritten digits that come with the program, in about two
    /// minutes. Ctrl-C stops after the step with a checkpoint; --resume goes on from it, bit for bit.
    #[command(name = "crossformer")]
    CrossFormer(Box<TrainCrossFormer>),
    /// An ensemble whose answers no attacker can change by a few poisoned training images: Finite Aggregation.
    ///
    /// Splits the training set into k·d buckets by a hash of each image, and trains k·d base classifiers on d buckets
    /// each. Then `gridgrad certify RUN` tells how many inserted or deleted images every answer withstands. A run that is
    /// stopped, by Ctrl-C or otherwise, goes on with --resume and ends with the same bytes.
    FiniteAggregation(Box<TrainFiniteAggregation>),
    /// Deep Partition Aggregation: Finite Aggregation with d = 1, every image in one classifier's training set.
    Dpa(Box<TrainDpa>),
    /// Bagging: classifiers that each draw their images with replacement. Its certificate holds with a probability.
    Bagging(Box<TrainBagging>),
    /// The limit of Finite Aggregation for a large d: classifiers that each keep every image with probability 1/k. Its
    /// certificate holds with a probability, as that of bagging.
    RandomSubsets(Box<TrainRandomSubsets>),
}

/// Flags of `gridgrad train crossformer`. A flag goes over the configuration file, which goes over the defaults.
#[derive(Args)]
pub struct TrainCrossFormer {
    /// builtin (where absent), mnist, cifar10, cifar100, gtsrb, imagenette (under the folder that GRIDGRAD_DATA names), or
    /// a folder
    #[arg(long)]
    data: Option<String>,
    /// micro, tiny, small, base, large, ++small, ++base, ++large, ++huge; where absent micro for sets of small images,
    /// tiny for others
    #[arg(long)]
    model: Option<String>,
    /// A TOML file with any of: data, batch_size, workers, and the tables [train], [model], [augment]
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
    /// Where the run's files go; a new folder under runs/ where absent
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Goes on with the run in this folder, with the settings that it was started with
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["data", "model", "config", "out", "epochs", "batch_size",
        "lr", "seed", "image_size", "workers", "augment", "precision"])]
    resume: Option<PathBuf>,
    /// Passes over the training images
    #[arg(long, value_parser = value_parser!(u32).range(1..))]
    epochs: Option<u32>,
    /// Images in a step
    #[arg(long)]
    batch_size: Option<usize>,
    /// Highest learning rate
    #[arg(long, allow_negative_numbers = true)]
    lr: Option<f64>,
    /// Decides first weights, order, augmentation and stochastic depth
    #[arg(long, value_parser = value_parser!(u64).range(..=i64::MAX as u64))] // TOML knows no larger number
    seed: Option<u64>,
    /// Side of the images that the network sees, in pixels
    #[arg(long, value_name = "PIXELS")]
    image_size: Option<usize>,
    /// Threads that decode and augment
    #[arg(long)]
    workers: Option<usize>,
    /// imagenet, digits, small or none; what suits the data where absent
    #[arg(long, value_name = "PRESET")]
    augment: Option<String>,
    #[command(flatten)]
    device: DeviceFlag,
    /// f32, bf16 or f16: in what the network computes. Weights and optimizer stay in f32
    #[arg(long)]
    precision: Option<Precision>,
    /// Records a step on the GPU once and repeats it, which saves launching its kernels one by one. The bits are the same
    #[arg(long)]
    cuda_graph: bool,
}

pub fn run(train: Train) -> Result<()> {
    match train {
        Train::CrossFormer(flags) => train_crossformer(*flags),
        Train::FiniteAggregation(flags) => flags.run(),
        Train::Dpa(flags) => flags.run(),
        Train::Bagging(flags) => flags.run(),
        Train::RandomSubsets(flags) => flags.run(),
    }
}

fn train_crossformer(flags: TrainCrossFormer) -> Result<()> {
    let device = flags.device.get()?;
    if flags.cuda_graph && device == Device::Cpu {
        return Err(Error::Config("--cuda-graph records steps on a GPU; add --device cuda".into()));
    }
    match &flags.resume {
        Some(folder) => {
            require_checkpoint(folder)?;
            let settings = settings::read::<Settings>(&folder.join(CONFIG_FILE))?;
            run_settings(&settings, folder, true, (device, flags.cuda_graph))
        }
        None => {
            let settings = flags.settings()?;
            let folder = flags.folder(&settings)?;
            run_settings(&settings, &folder, false, (device, flags.cuda_graph))
        }
    }
}

impl TrainCrossFormer {
    /// Flags over the file over what suits the data.
    fn settings(&self) -> Result<Settings> {
        let file: File = self.config.as_deref().map(settings::read).transpose()?.unwrap_or_default();
        let data = self.data.clone().or(file.data).unwrap_or_else(|| "builtin".into());
        let dataset = data::open(&data, Split::Train, None)?;
        let is_small = ["builtin", "mnist", "cifar10", "cifar100", "gtsrb"].contains(&data.as_str());
        let mut augment = match (&self.augment, file.augment) {
            (Some(preset), _) => preset_for(preset, &data)?,
            (None, Some(augment)) => augment,
            (None, None) => AugmentConfig::for_set(&data).unwrap_or_else(AugmentConfig::imagenet),
        };
        if let Some(size) = self.image_size {
            augment.image_size = size;
        }
        let size_in_file = file.model.as_ref().and_then(|table| table.get("img_size")).is_some();
        let mut model = self.model_config(file.model, is_small, &*dataset)?;
        let size = [augment.image_size; 2];
        if size_in_file && self.image_size.is_none() && model.img_size != size {
            let message = format!("[model] img_size is {:?}, [augment] image_size makes it {size:?}", model.img_size);
            return Err(Error::Config(message));
        }
        model.img_size = size;
        model.validate()?;
        let batch_size = self.batch_size.or(file.batch_size).unwrap_or(if is_small { 64 } else { 32 });
        let lr = if is_small { 1.5e-3 } else { 5e-4 * batch_size as f64 / 64.0 };
        let train = self.training(file.train.unwrap_or_default(), &data, lr)?;
        let workers = self.workers.or(file.workers).unwrap_or(1);
        Ok(Settings { data, batch_size, workers, train, model, augment })
    }

    fn model_config(&self, file: Option<toml::Table>, is_small: bool, data: &dyn Dataset) -> Result<CrossFormerConfig> {
        let classes = data.class_names().len();
        let mut config = match (&self.model, file) {
            (Some(name), _) => named(name, classes)?,
            (None, Some(table)) => CrossFormerConfig { num_classes: classes, ..self.parse_table("model", table)? },
            (None, None) => named(if is_small { "micro" } else { "tiny" }, classes)?,
        };
        if config.kind != Kind::Classifier {
            return Err(Error::Config(
                "[model] kind is a backbone's; only a classifier (kind = \"cls\") is trained".into(),
            ));
        }
        config.in_chans = data.channels();
        Ok(config)
    }

    /// The file's keys over what suits the data and so many epochs.
    fn training(&self, mut file: toml::Table, data: &str, lr: f64) -> Result<TrainConfig> {
        if let Some(epochs) = self.epochs {
            file.insert("epochs".into(), i64::from(epochs).into());
        }
        let epochs = file.get("epochs").and_then(toml::Value::as_integer).unwrap_or_else(|| default_epochs(data));
        let defaults = default_training(epochs, self.lr.unwrap_or(lr));
        let mut table = toml::Table::try_from(&defaults)
            .map_err(|error| Error::Config(format!("the defaults cannot be written as TOML: {error}")))?;
        table.extend(file);
        let mut train: TrainConfig = self.parse_table("train", table)?;
        train.schedule.lr = self.lr.unwrap_or(train.schedule.lr);
        train.seed = self.seed.unwrap_or(train.seed);
        train.precision = self.precision.unwrap_or(train.precision);
        Ok(train)
    }

    fn parse_table<T: DeserializeOwned>(&self, name: &str, table: toml::Table) -> Result<T> {
        table.try_into().map_err(|error: toml::de::Error| {
            let reason = error.to_string().trim_end().replace('\n', " ");
            Error::format(self.config.clone().unwrap_or_default(), format!("[{name}] {reason}"))
        })
    }

    /// The folder for the run: the given one, or the first free one under `runs/`.
    fn folder(&self, settings: &Settings) -> Result<PathBuf> {
        if let Some(folder) = &self.out {
            let taken = [CONFIG_FILE, LAST_CHECKPOINT, BEST_CHECKPOINT, METRICS_FILE]
                .iter()
                .any(|file| folder.join(file).exists());
            if taken {
                let message = format!(
                    "{0} holds a run already; go on with it by --resume {0}, or choose another --out",
                    folder.display()
                );
                return Err(Error::Config(message));
            }
            return Ok(folder.clone());
        }
        free_folder("crossformer", &settings.data)
    }
}

/// The first free folder under `runs/` for a run of `method` on `data`.
pub fn free_folder(method: &str, data: &str) -> Result<PathBuf> {
    let set = Path::new(data).file_name().map_or("data".into(), |name| name.to_string_lossy().into_owned());
    let name = |number: usize| match number {
        1 => format!("runs/{method}-{set}"),
        _ => format!("runs/{method}-{set}-{number}"),
    };
    let free = (1..10_000).map(|number| PathBuf::from(name(number))).find(|folder| !folder.exists());
    free.ok_or_else(|| Error::Config("10,000 runs under runs/; choose a folder with --out".into()))
}

/// A preset with the data's own mean and deviation where they are known.
fn preset_for(preset: &str, data: &str) -> Result<AugmentConfig> {
    let mut augment = AugmentConfig::preset(preset)?;
    if let Some(known) = AugmentConfig::for_set(data) {
        augment.normalise = known.normalise;
    }
    Ok(augment)
}

/// Epochs that bring the small networks far in a few minutes on two cores.
fn default_epochs(data: &str) -> i64 {
    match data {
        "builtin" => 40,
        "mnist" => 5,
        "cifar10" | "cifar100" | "gtsrb" => 60,
        _ => 30,
    }
}

/// What trains the small networks well in so many epochs. Low rates stay below `lr`, whatever it is.
fn default_training(epochs: i64, lr: f64) -> TrainConfig {
    let epochs = usize::try_from(epochs).unwrap_or(0);
    TrainConfig {
        epochs,
        schedule: ScheduleConfig {
            lr,
            warmup: Some(Warmup { length: Span::Epochs(epochs as f64 / 20.0), start_lr: lr.clamp(0.0, 1e-6) }),
            decay: Decay::Cosine { floor: lr.clamp(0.0, 1e-5) },
        },
        ..TrainConfig::default()
    }
}

/// A run's folder has a checkpoint once its first epoch is done, or it was stopped by Ctrl-C.
fn require_checkpoint(folder: &Path) -> Result<()> {
    if folder.join(LAST_CHECKPOINT).exists() {
        return Ok(());
    }
    let folder = folder.display();
    Err(Error::Config(format!("{folder} has no {LAST_CHECKPOINT} to go on from; start a new run with another --out")))
}

fn loader(dataset: Arc<dyn Dataset>, settings: &Settings, training: bool) -> Result<Loader> {
    Loader::new(
        dataset,
        LoaderConfig {
            batch_size: settings.batch_size,
            shuffle: training,
            seed: settings.train.seed,
            drop_last: training,
            workers: settings.workers,
            augment: settings.augment.clone(),
            training,
            ..LoaderConfig::default()
        },
    )
}

fn run_settings(settings: &Settings, folder: &Path, resume: bool, (device, graph): (Device, bool)) -> Result<()> {
    let train_set: Arc<dyn Dataset> = Arc::from(data::open(&settings.data, Split::Train, None)?);
    let test_set: Arc<dyn Dataset> = Arc::from(data::open(&settings.data, Split::Test, None)?);
    if train_set.class_names() != test_set.class_names() {
        return Err(Error::Config(format!("{}: training and held-out images have other classes", settings.data)));
    }
    let model = CrossFormer::new(settings.model.clone(), settings.train.seed, DType::F32)?;
    model.parameters().to_device(device)?;
    let (batches, held_out) = (loader(train_set.clone(), settings, true)?, loader(test_set.clone(), settings, false)?);
    let description = Description {
        data: settings.data.clone(),
        classes: train_set.class_names().to_vec(),
        batch_size: settings.batch_size,
        model: settings.model.clone(),
        augment: settings.augment.clone(),
    };
    let description = serde_json::to_value(description)
        .map_err(|error| Error::Config(format!("the settings cannot be written as JSON: {error}")))?;
    let mut trainer = Trainer::new(TrainingRun {
        model: &model,
        batches: &batches,
        held_out: Some(&held_out),
        config: settings.train.clone(),
        description,
        folder: Some(folder.to_path_buf()),
    })?;
    trainer.repeat_recorded_steps(graph);
    if resume {
        trainer.resume(folder.join(LAST_CHECKPOINT))?;
    } else {
        std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
        settings.write(&folder.join(CONFIG_FILE))?;
    }
    introduce(settings, &model, &*train_set, &*test_set, folder, device)?;
    let stop = stop_on_ctrl_c("this step")?;
    let start = Instant::now();
    let mut display = Display::new(settings.train.epochs, format!("CrossFormer on {}", settings.data), folder.into());
    if resume {
        display.recall(trainer.progress().step)?;
    }
    let outcome = trainer.run(&mut display, &stop);
    display.finish();
    match outcome? {
        Outcome::Interrupted { step } => print(&format!(
            "Stopped after step {step}. {}\nGo on with:\n  gridgrad train crossformer --resume {}\n",
            peak_memory(device)?,
            folder.display()
        )),
        Outcome::Finished { .. } => conclude(&*test_set, folder, start.elapsed(), &trainer, device),
    }
}

fn introduce(
    settings: &Settings,
    model: &CrossFormer,
    train_set: &dyn Dataset,
    test_set: &dyn Dataset,
    folder: &Path,
    device: Device,
) -> Result<()> {
    let place = match device {
        Device::Cpu => format!("on {} threads", rayon::current_num_threads()),
        device => format!("on {device}"),
    };
    let images = settings.batch_size.saturating_mul(settings.train.accumulation);
    let steps = (train_set.len() / settings.batch_size).div_ceil(settings.train.accumulation);
    let total = model.cost()?.total();
    let [height, width] = settings.model.img_size;
    print(&format!(
        "CrossFormer: {} parameters, {:.1} million multiply-adds for an image of {height}×{width}\n\
         {}: {} training images, {} held out, {} classes\n\
         {} epochs of {} steps with {} images each, {place}; files go to {}\n\n",
        grouped(total.parameters),
        total.products as f64 / 1e6,
        train_set.name(),
        grouped(train_set.len()),
        grouped(test_set.len()),
        train_set.class_names().len(),
        settings.train.epochs,
        steps,
        images,
        folder.display(),
    ))
}

/// A flag that the first Ctrl-C sets; the second one ends the program at once.
pub fn stop_on_ctrl_c(after: &'static str) -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let handler = move || {
        if flag.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        complain(&format!("\nStopping after {after}; once more to stop at once."));
    };
    ctrlc::set_handler(handler).map_err(|error| Error::Config(format!("cannot listen for Ctrl-C: {error}")))?;
    Ok(stop)
}

fn conclude(
    test_set: &dyn Dataset,
    folder: &Path,
    time: Duration,
    trainer: &Trainer<'_>,
    device: Device,
) -> Result<()> {
    let memory = peak_memory(device)?;
    let trained = Trained::read(&folder.join(BEST_CHECKPOINT), device)?;
    pictures::draw(&trained, test_set, folder)?;
    let best = trainer.progress().best_accuracy.unwrap_or(0.0);
    let last = trainer.progress().history.last().and_then(|epoch| epoch.held_out).map_or(0.0, |held_out| held_out.top1);
    let file = |name: &str| folder.join(name).display().to_string();
    print(&format!(
        "\nAccuracy on held-out images: {:.2} % after the last epoch, {:.2} % after the best one\n\
         Trained for {}. {memory}\n\n\
         {}  the best network; try: gridgrad predict {} IMAGE\n\
         {}  loss and accuracy of every epoch\n\
         {}  held-out images and what the network takes them for\n\
         {}  what attention heads look at\n\
         {}  every number, a line of JSON each\n",
        100.0 * last,
        100.0 * best,
        human(time),
        file(BEST_CHECKPOINT),
        folder.display(),
        file(CURVES),
        file(pictures::PREDICTIONS),
        file(pictures::ATTENTION),
        file(METRICS_FILE),
    ))
}
