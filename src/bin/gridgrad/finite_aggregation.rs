//! `gridgrad train finite-aggregation`, `dpa`, `bagging` and `random-subsets`: the base classifiers of a certified
//! ensemble.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};
use gridgrad::data::{self, Split};
use gridgrad::methods::finite_aggregation::learner::{self, BaseLearner, NearestNeighbour, NetworkInNetwork};
use gridgrad::methods::finite_aggregation::run::{
    Ensemble, MANIFEST, Manifest, Record, Run, Settings, Shard, Sources, merge,
};
use gridgrad::methods::finite_aggregation::{ContentHash, Spread};
use gridgrad::train::many::{Recipe, Trainer};
use gridgrad::{Device, Error, Result};

use crate::device::DeviceFlag;
use crate::info::grouped;
use crate::output::print;
use crate::progress::{bar, human, peak_memory};
use crate::train::{free_folder, stop_on_ctrl_c};

/// Flags of `gridgrad train finite-aggregation`.
#[derive(Args)]
pub struct TrainFiniteAggregation {
    /// Inverse sensitivity: a poisoned image touches at most one in K votes; 25 for the built-in digits, 1200 for MNIST,
    /// 50 for CIFAR-10 and GTSRB where absent
    #[arg(short, long, value_name = "K", conflicts_with = "resume")]
    k: Option<usize>,
    /// Spreading degree: every image is in the training sets of D classifiers, of which there are K·D; 2 for the built-in
    /// digits, 16 for others where absent
    #[arg(short, long, value_name = "D", conflicts_with = "resume")]
    d: Option<usize>,
    /// fnv1a, or pixel-sum as published: what sends an image to its bucket
    #[arg(long, default_value_t = ContentHash::Fnv1a, conflicts_with = "resume")]
    hash: ContentHash,
    #[command(flatten)]
    common: Common,
}

/// Flags of `gridgrad train dpa`.
#[derive(Args)]
pub struct TrainDpa {
    /// Number of partitions and classifiers; 25 for the built-in digits, 1200 for MNIST, 50 for CIFAR-10 and GTSRB where
    /// absent
    #[arg(short, long, value_name = "K", conflicts_with = "resume")]
    k: Option<usize>,
    /// fnv1a, or pixel-sum as published: what sends an image to its partition
    #[arg(long, default_value_t = ContentHash::Fnv1a, conflicts_with = "resume")]
    hash: ContentHash,
    #[command(flatten)]
    common: Common,
}

/// Flags of `gridgrad train bagging`.
#[derive(Args)]
pub struct TrainBagging {
    /// Number of classifiers
    #[arg(long, value_name = "N", default_value_t = 100, conflicts_with = "resume")]
    models: usize,
    /// Images that each classifier draws, with replacement
    #[arg(long, value_name = "N", default_value_t = 50, conflicts_with = "resume")]
    samples: usize,
    #[command(flatten)]
    common: Common,
}

/// Flags of `gridgrad train random-subsets`.
#[derive(Args)]
pub struct TrainRandomSubsets {
    /// Each classifier keeps an image with probability 1/K; 25 for the built-in digits, 1200 for MNIST, 50 for CIFAR-10
    /// and GTSRB where absent
    #[arg(short, long, value_name = "K", conflicts_with = "resume")]
    k: Option<usize>,
    /// Number of classifiers
    #[arg(long, value_name = "N", default_value_t = 100, conflicts_with = "resume")]
    models: usize,
    #[command(flatten)]
    common: Common,
}

/// What trains the base classifiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LearnerKind {
    /// The Network-in-Network of the papers
    Nin,
    /// The nearest neighbour of the image, by Euclidean distance
    Nearest,
}

/// What a network sees of a training image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Augment {
    /// The image
    None,
    /// A random crop of the padded image
    Crop,
    /// A random crop of the padded image, mirrored or not
    CropFlip,
}

/// Flags that all ensembles have.
#[derive(Args)]
struct Common {
    /// builtin, mnist, cifar10, cifar100, gtsrb, imagenette (under the folder that GRIDGRAD_DATA names), or a folder
    #[arg(long, default_value = "builtin", conflicts_with = "resume")]
    data: String,
    /// What trains the base classifiers
    #[arg(long, value_enum, default_value = "nin", conflicts_with = "resume")]
    learner: LearnerKind,
    /// Passes of a network over its subset; 200 as published where absent, and fewer for the built-in digits
    #[arg(long, conflicts_with = "resume")]
    epochs: Option<usize>,
    /// Images in a step; 128 as published where absent, and fewer for the built-in digits
    #[arg(long, conflicts_with = "resume")]
    batch_size: Option<usize>,
    /// First learning rate; 0.1 as published where absent, and less for the built-in digits
    #[arg(long, allow_negative_numbers = true, conflicts_with = "resume")]
    lr: Option<f64>,
    /// What a network sees of a training image; where absent none for the built-in digits, and else as published:
    /// crop-flip for CIFAR, crop for others
    #[arg(long, value_enum, conflicts_with = "resume")]
    augment: Option<Augment>,
    /// Networks that are computed by one op, which changes no bit
    #[arg(long, value_name = "G")]
    group: Option<usize>,
    /// Classifier i has the seed SEED + i, which decides first weights, order and augmentation
    #[arg(long, default_value_t = 0, conflicts_with = "resume")]
    seed: u64,
    /// Side in pixels to which images are resized; where absent, the one that the held-out images share, or else 48
    #[arg(long, value_name = "PIXELS", conflicts_with = "resume")]
    image_size: Option<usize>,
    /// Trains on about this fraction of the images, such as 0.1: each image's bytes decide whether it takes part
    #[arg(long, value_name = "F", allow_negative_numbers = true, conflicts_with = "resume")]
    train_fraction: Option<f64>,
    /// Tests on N held-out images, a draw that never changes
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    limit_test: Option<usize>,
    /// Keeps each classifier's votes alone, without the scores that run-off election needs
    #[arg(long, conflicts_with = "resume")]
    votes_only: bool,
    /// Keeps each classifier's weights
    #[arg(long, conflicts_with = "resume")]
    keep_weights: bool,
    /// Trains part I of N of the classifiers, for machines that share the work; see `gridgrad merge-shards`
    #[arg(long, value_name = "I/N", conflicts_with = "resume")]
    shard: Option<Shard>,
    /// Where the run's files go; a new folder under runs/ where absent
    #[arg(long, visible_alias = "output", value_name = "RUN", conflicts_with = "resume")]
    out: Option<PathBuf>,
    /// Goes on with this run
    #[arg(long, value_name = "RUN")]
    resume: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceFlag,
}

impl TrainFiniteAggregation {
    pub fn run(&self) -> Result<()> {
        let ensemble = || {
            let data = &self.common.data;
            let d = self.d.unwrap_or(if data == "builtin" { 2 } else { 16 });
            Ok(Ensemble::FiniteAggregation { spread: Spread::new(default_k(self.k, data)?, d)?, hash: self.hash })
        };
        self.common.run("finite-aggregation", ensemble)
    }
}

impl TrainDpa {
    pub fn run(&self) -> Result<()> {
        let ensemble = || {
            let k = default_k(self.k, &self.common.data)?;
            Ok(Ensemble::FiniteAggregation { spread: Spread::new(k, 1)?, hash: self.hash })
        };
        self.common.run("dpa", ensemble)
    }
}

impl TrainBagging {
    pub fn run(&self) -> Result<()> {
        let ensemble = || Ok(Ensemble::Bagging { classifiers: self.models, samples: self.samples });
        self.common.run("bagging", ensemble)
    }
}

impl TrainRandomSubsets {
    pub fn run(&self) -> Result<()> {
        let k = || default_k(self.k, &self.common.data);
        let ensemble = || Ok(Ensemble::RandomSubsets { k: k()?, classifiers: self.models });
        self.common.run("random-subsets", ensemble)
    }
}

/// That of the published experiments.
fn default_k(k: Option<usize>, data: &str) -> Result<usize> {
    k.map_or_else(
        || match data {
            "builtin" => Ok(25),
            "mnist" => Ok(1200),
            "cifar10" | "gtsrb" => Ok(50),
            _ => {
                data::open(data, Split::Train, None)?;
                Err(Error::Config(format!("data set {data:?} has no usual number of partitions; add --k")))
            }
        },
        Ok,
    )
}

impl Common {
    fn run(&self, method: &str, ensemble: impl Fn() -> Result<Ensemble>) -> Result<()> {
        let device = self.device.get()?;
        if let Some(folder) = &self.resume {
            let manifest = Manifest::read(folder)?;
            let keep_weights = manifest.run.settings.keep_weights;
            let learner = learner::from_recipe(&manifest.run.recipe, device, self.group, keep_weights)?;
            return with_sources(&manifest.run.settings, &*learner, |sources| {
                train(Run::resume(folder, sources)?, folder, device)
            });
        }
        let settings = self.settings(ensemble()?);
        let shard = self.shard.unwrap_or(Shard::WHOLE);
        // Shards are started side by side: each has a name of its own.
        let name = match shard.count {
            1 => method.to_owned(),
            count => format!("{method}-shard-{}-of-{count}", shard.index),
        };
        let folder = self.out.clone().map_or_else(|| free_folder(&name, &self.data), Ok)?;
        if folder.join(MANIFEST).exists() {
            let message = format!(
                "{0} holds a run already; go on with it by --resume {0}, or choose another --out",
                folder.display()
            );
            return Err(Error::Config(message));
        }
        let learner = self.learner(device)?;
        with_sources(&settings, &*learner, |sources| {
            train(Run::create(&folder, settings.clone(), shard, sources)?, &folder, device)
        })
    }

    fn settings(&self, ensemble: Ensemble) -> Settings {
        Settings {
            data: self.data.clone(),
            image_size: self.image_size,
            train_fraction: self.train_fraction,
            limit_test: self.limit_test,
            ensemble,
            seed: self.seed,
            keep_scores: !self.votes_only,
            keep_weights: self.keep_weights,
        }
    }

    fn learner(&self, device: Device) -> Result<Box<dyn BaseLearner>> {
        if self.learner == LearnerKind::Nearest {
            let of_networks = [
                ("epochs", self.epochs.is_some()),
                ("batch-size", self.batch_size.is_some()),
                ("lr", self.lr.is_some()),
                ("augment", self.augment.is_some()),
                ("group", self.group.is_some()),
                ("keep-weights", self.keep_weights),
            ];
            return match of_networks.iter().find(|(_, is_there)| *is_there) {
                Some((flag, _)) => Err(Error::Config(format!("--{flag} is for --learner nin alone"))),
                None => Ok(Box::new(NearestNeighbour)),
            };
        }
        let recipe = self.recipe();
        // Before anything is written.
        recipe.check()?;
        let trainer = Trainer::new(recipe).on(device).keep_weights(self.keep_weights);
        Ok(Box::new(NetworkInNetwork::new(match self.group {
            Some(group) => trainer.group(group),
            None => trainer,
        })))
    }

    /// The published recipe, or what does well on tiny digits in a minute, with flags over it.
    fn recipe(&self) -> Recipe {
        let published = Recipe::default();
        let suited = match self.data.as_str() {
            "builtin" => Recipe { epochs: 10, batch_size: 8, learning_rate: 0.01, crop_padding: 1, ..published },
            "cifar10" | "cifar100" => Recipe { flip: true, ..published },
            _ => published,
        };
        let (crop_padding, flip) = match self.augment {
            // Crops of so few pixels teach less than they cost in so few steps.
            None if self.data == "builtin" => (0, false),
            None => (suited.crop_padding, suited.flip),
            Some(Augment::None) => (0, false),
            Some(augment) => (suited.crop_padding, augment == Augment::CropFlip),
        };
        Recipe {
            epochs: self.epochs.unwrap_or(suited.epochs),
            batch_size: self.batch_size.unwrap_or(suited.batch_size),
            learning_rate: self.lr.unwrap_or(suited.learning_rate),
            crop_padding,
            flip,
            ..suited
        }
    }
}

/// Calls `body` with both sets and the learner.
fn with_sources(
    settings: &Settings,
    learner: &dyn BaseLearner,
    body: impl FnOnce(&Sources<'_>) -> Result<()>,
) -> Result<()> {
    let train = data::open(&settings.data, Split::Train, None)?;
    let test = data::open(&settings.data, Split::Test, None)?;
    body(&Sources { train: &*train, test: &*test, learner })
}

fn train(mut run: Run<'_>, folder: &Path, device: Device) -> Result<()> {
    print(&introduction(run.manifest(), folder, device))?;
    let stop = stop_on_ctrl_c("this group of classifiers")?;
    let (all, start) = (run.manifest().classifiers.len(), Instant::now());
    let trained = |manifest: &Manifest| manifest.classifiers.iter().filter(|one| one.trained.is_some()).count();
    let before = trained(run.manifest());
    let progress = bar(all as u64, "{bar:30} {pos}/{len} classifiers, {eta} left");
    progress.set_position(before as u64);
    let finished = run.train(&stop, |_: &Record| {
        progress.inc(1);
        Ok(())
    });
    progress.finish_and_clear();
    let (finished, done, time) = (finished?, trained(run.manifest()), human(start.elapsed()));
    let (place, memory) = (folder.display(), peak_memory(device)?);
    if !finished {
        return print(&format!(
            "Stopped with {done} of {all} classifiers. {memory}\nGo on with:\n  {} --resume {place}\n",
            command(&run.manifest().run.settings.ensemble),
        ));
    }
    let next = match run.manifest().shard {
        Shard { count: 1, .. } => format!("Certify its answers with:\n  gridgrad certify {place}\n"),
        shard => format!("That was shard {shard}. With the others:\n  gridgrad certify {place} OTHER-SHARDS…\n"),
    };
    print(&format!("Trained {} classifiers in {time}. {memory}\n{next}", done - before))
}

/// The command that trains such an ensemble.
fn command(ensemble: &Ensemble) -> &'static str {
    match ensemble {
        Ensemble::FiniteAggregation { spread, .. } if spread.d() == 1 => "gridgrad train dpa",
        Ensemble::FiniteAggregation { .. } => "gridgrad train finite-aggregation",
        Ensemble::Bagging { .. } => "gridgrad train bagging",
        Ensemble::RandomSubsets { .. } => "gridgrad train random-subsets",
    }
}

fn introduction(manifest: &Manifest, folder: &Path, device: Device) -> String {
    let (settings, data) = (&manifest.run.settings, &manifest.run.data);
    let ensemble = match &settings.ensemble {
        Ensemble::FiniteAggregation { spread, hash } => {
            let (k, d, n) = (spread.k(), spread.d(), spread.n());
            let name = if d == 1 { "Deep Partition Aggregation" } else { "Finite Aggregation" };
            format!("{name}: k = {k}, d = {d}, {} classifiers, buckets by {hash}", grouped(n))
        }
        Ensemble::Bagging { classifiers, samples } => {
            format!("Bagging: {} classifiers of {} draws each", grouped(*classifiers), grouped(*samples))
        }
        Ensemble::RandomSubsets { k, classifiers } => {
            format!("Random subsets: k = {k}, {} classifiers", grouped(*classifiers))
        }
    };
    let sizes = || manifest.classifiers.iter().map(|record| record.samples);
    let place = match device {
        Device::Cpu => format!("on {} threads", rayon::current_num_threads()),
        device => format!("on {device}"),
    };
    let part = match manifest.shard {
        Shard { count: 1, .. } => String::new(),
        shard => format!("shard {shard}: {} of them; ", grouped(manifest.classifiers.len())),
    };
    let [height, width, _] = data.shape;
    format!(
        "{ensemble}\n\
         {}: {} training images of {height}×{width}, {} to {} for a classifier; {} held out, {} classes\n\
         {part}{place}; files go to {}\n\n",
        settings.data,
        grouped(data.train_samples),
        grouped(sizes().min().unwrap_or(0)),
        grouped(sizes().max().unwrap_or(0)),
        grouped(data.test_labels.len()),
        data.classes.len(),
        folder.display(),
    )
}

/// Flags of `gridgrad merge-shards`.
#[derive(Args)]
pub struct MergeShards {
    /// The folders of all shards of a run, in any order
    #[arg(required = true)]
    shards: Vec<PathBuf>,
    /// The folder of the whole run
    #[arg(long, visible_alias = "output", value_name = "RUN")]
    out: PathBuf,
}

impl MergeShards {
    pub fn run(&self) -> Result<()> {
        let manifest = merge(&self.shards, &self.out)?;
        let classifiers = grouped(manifest.classifiers.len());
        print(&format!(
            "Merged {} shards with {classifiers} classifiers. Certify their answers with:\n  gridgrad certify {}\n",
            self.shards.len(),
            self.out.display()
        ))
    }
}
