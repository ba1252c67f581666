//! `gridgrad certify`: certified radii from the answers of an ensemble.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use gridgrad::file::write_atomically;
use gridgrad::methods::finite_aggregation::certify::BaggingOptions;
use gridgrad::methods::finite_aggregation::run::{Answers, Ensemble, Manifest};
use gridgrad::methods::finite_aggregation::{Method, Report, Spread, VoteFile, certify_table};
use gridgrad::report::{CertifiedCurve, certified_curves};
use gridgrad::{Error, Result};

use crate::output::{print, table};

/// Which answers, how they were trained, and where results go.
#[derive(Args)]
pub struct Certify {
    /// The folder of a run of `gridgrad train finite-aggregation`, `dpa`, `bagging` or `random-subsets`, or those of all
    /// its shards.
    #[arg(value_name = "RUN", required_unless_present = "votes")]
    runs: Vec<PathBuf>,
    /// DPA*: the runs are versions of one, trained with different --seed, and a classifier's scores are added over them.
    #[arg(long, conflicts_with = "votes")]
    boosted: bool,
    /// Answers of an ensemble made elsewhere: `votes` (samples, classifiers) or `scores` (samples, classifiers, classes), optionally
    /// `offsets` (d) and `labels` (samples).
    #[arg(long, value_name = "FILE.safetensors", conflicts_with = "runs")]
    votes: Option<PathBuf>,
    /// Inverse sensitivity: one poisoned sample reaches one in k classifiers.
    #[arg(long, conflicts_with = "runs")]
    k: Option<usize>,
    /// Spreading degree: classifiers that each sample trains.
    #[arg(long, conflicts_with = "runs")]
    d: Option<usize>,
    /// Classes; a vote of this number is an abstention. Taken from scores, labels and votes where absent.
    #[arg(long, value_name = "C", conflicts_with = "runs")]
    num_classes: Option<usize>,
    /// How answers are certified; a run's own method where absent.
    #[arg(long, value_enum, required_unless_present = "runs")]
    method: Option<MethodName>,
    /// Samples that each classifier of a bagging ensemble drew at random. Without it and --train-size, --method bagging is
    /// hash bagging, where a sample reaches d of k·d classifiers.
    #[arg(long, value_name = "N", conflicts_with = "runs")]
    subset_size: Option<usize>,
    /// Samples of the training set that bagging drew from, up to 100,000,000.
    #[arg(long, value_name = "N", conflicts_with = "runs")]
    train_size: Option<usize>,
    /// Probability that a certificate of bagging or infinite-bound is wrong.
    #[arg(long, default_value_t = 0.001)]
    alpha: f64,
    #[command(flatten)]
    outputs: Outputs,
}

/// Where a report goes.
#[derive(Args)]
pub struct Outputs {
    /// Writes every sample's radius and the certified fractions: of correct answers, or without labels of all. Where a single run is certified, this and the other two
    /// files go to its folder where absent, as certified-METHOD.json and so on.
    #[arg(long, value_name = "OUT")]
    json: Option<PathBuf>,
    /// Writes the certified fraction at each size.
    #[arg(long, value_name = "OUT")]
    csv: Option<PathBuf>,
    /// Draws the certified fractions.
    #[arg(long, value_name = "OUT.svg")]
    plot: Option<PathBuf>,
    /// A report written by --json, or the folder of a run, to draw beside this one; may be given several times.
    #[arg(long, value_name = "REPORT")]
    beside: Vec<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum MethodName {
    /// Deep Partition Aggregation (d = 1)
    Dpa,
    /// Finite Aggregation
    Fa,
    /// Finite Aggregation's bound from the margin alone
    Coarse,
    /// Run-off election, from scores
    #[value(alias = "roe")]
    FaRoe,
    /// Enumeration of all attacks, for up to 20 classifiers
    Exact,
    /// Bagging, probabilistic; hash bagging where --subset-size and --train-size are absent
    Bagging,
    /// What a large d could bring: an estimate, no certificate
    InfiniteEstimate,
    /// The certificate of classifiers on independent random subsets, probabilistic
    InfiniteBound,
}

/// Certifies a run, or a file of answers.
pub fn run(mut args: Certify) -> Result<()> {
    let (report, mut companions) = match &args.votes {
        Some(path) => args.of_file(path)?,
        None => args.of_runs()?,
    };
    let mut hint = None;
    if let ([folder, ..], true) = (&args.runs[..], args.outputs.beside.is_empty() && improves_on_dpa(&report)) {
        match dpa_beside(folder)? {
            Some(dpa) => companions.push(dpa),
            None => hint = Some(args.hint_at_dpa(&report)),
        }
    }
    if let [folder] = &args.runs[..] {
        args.outputs.fill(folder, &report.method);
    }
    if args.outputs.plot.is_none() && !args.outputs.beside.is_empty() {
        return Err(Error::Config("--beside draws reports into the picture: add --plot".into()));
    }
    args.outputs.write(&report, companions)?;
    hint.map_or(Ok(()), |hint| print(&hint))
}

/// Whether a picture of this report wants the curve of Deep Partition Aggregation beside it.
fn improves_on_dpa(report: &Report) -> bool {
    let names = [Method::FiniteAggregation.name(), Method::RunOff.name()];
    names.contains(&report.method.as_str()) && report.spread.as_ref().is_some_and(|spread| spread.d() > 1)
}

/// The report of a run of Deep Partition Aggregation in the folder that the run `folder` is in, with the same k, data,
/// recipe and hash: the first by name that is whole. Folders that are no such run are passed over.
fn dpa_beside(folder: &Path) -> Result<Option<Report>> {
    let run = Manifest::read(folder)?.run;
    let Ensemble::FiniteAggregation { spread, hash } = &run.settings.ensemble else { return Ok(None) };
    let is_dpa = |other: &Ensemble| match other {
        Ensemble::FiniteAggregation { spread: its, hash: its_hash } => {
            its.d() == 1 && its.k() == spread.k() && its_hash == hash
        }
        Ensemble::Bagging { .. } | Ensemble::RandomSubsets { .. } => false,
    };
    let is_comparable = |path: &PathBuf| {
        Manifest::read(path).is_ok_and(|other| {
            let same = other.run.data == run.data && other.run.recipe == run.recipe;
            same && is_dpa(&other.run.settings.ensemble)
        })
    };
    let whole = folder.canonicalize().map_err(|error| Error::io(folder, error))?;
    let Some(Ok(entries)) = whole.parent().map(std::fs::read_dir) else { return Ok(None) };
    let mut siblings: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    siblings.sort();
    Ok(siblings.iter().filter(|path| is_comparable(path)).find_map(|path| certified_run(path).ok()))
}

/// The reports that are drawn beside that of `method`: what it improves on.
fn companions(method: &Method, spread: &Spread, certify: impl Fn(&Method) -> Result<Report>) -> Result<Vec<Report>> {
    Ok(match method {
        Method::FiniteAggregation if spread.d() > 1 => vec![certify(&Method::Coarse)?],
        Method::RunOff => vec![certify(&Method::FiniteAggregation)?],
        _ => Vec::new(),
    })
}

impl Certify {
    fn of_file(&self, path: &Path) -> Result<(Report, Vec<Report>)> {
        let name = self.method.ok_or_else(|| Error::Config("--votes needs --method".into()))?;
        let method = self.method(name)?;
        if self.num_classes == Some(0) {
            return Err(Error::Config("--num-classes 0: expected at least 1".into()));
        }
        let answers = VoteFile::read(path, self.num_classes)?;
        let spread = self.spread(path, &answers, &method)?;
        let report = certify_table(&answers, &spread, &method)?;
        let beside = match self.outputs.plot {
            Some(_) => companions(&method, &spread, |method| certify_table(&answers, &spread, method))?,
            None => Vec::new(),
        };
        Ok((report, beside))
    }

    fn of_runs(&self) -> Result<(Report, Vec<Report>)> {
        let answers = if self.boosted { Answers::boosted(&self.runs)? } else { Answers::read(&self.runs)? };
        let own = answers.method(self.alpha);
        let method = match self.method {
            None => own,
            Some(MethodName::Bagging) if matches!(own, Method::Bagging(_)) => own,
            Some(MethodName::Bagging) => {
                return Err(Error::Config("--method bagging is for runs of gridgrad train bagging".into()));
            }
            Some(name) => self.method(name)?,
        };
        let report = answers.certify(&method)?;
        let beside = match &report.spread {
            Some(spread) => companions(&method, spread, |method| answers.certify(method))?,
            None => Vec::new(),
        };
        Ok((report, beside))
    }

    /// How to get the curve of Deep Partition Aggregation.
    fn hint_at_dpa(&self, report: &Report) -> String {
        let k = report.spread.as_ref().map_or(0, Spread::k);
        let runs: Vec<String> = self.runs.iter().map(|run| run.display().to_string()).collect();
        let (runs, boosted) = (runs.join(" "), if self.boosted { " --boosted" } else { "" });
        format!(
            "DPA is not beside it: gridgrad train dpa --k {k} --out DPA, with this run's data, learner and hash, then \
             gridgrad certify {runs}{boosted} --beside DPA\n"
        )
    }

    fn method(&self, name: MethodName) -> Result<Method> {
        if name != MethodName::Bagging && (self.subset_size.is_some() || self.train_size.is_some()) {
            return Err(Error::Config("--subset-size and --train-size are for --method bagging alone".into()));
        }
        Ok(match name {
            MethodName::Dpa => Method::Dpa,
            MethodName::Fa => Method::FiniteAggregation,
            MethodName::Coarse => Method::Coarse,
            MethodName::FaRoe => Method::RunOff,
            MethodName::Exact => Method::Exact,
            MethodName::Bagging => {
                let needs = |flag: &str| Err(Error::Config(format!("--method bagging needs {flag} as well")));
                match (self.subset_size, self.train_size) {
                    (None, None) => Method::HashBagging,
                    (Some(_), None) => return needs("--train-size"),
                    (None, Some(_)) => return needs("--subset-size"),
                    (Some(subset_size), Some(train_size)) => {
                        Method::Bagging(BaggingOptions { subset_size, train_size, alpha: self.alpha })
                    }
                }
            }
            MethodName::InfiniteEstimate => Method::InfiniteEstimate,
            MethodName::InfiniteBound => Method::InfiniteBound { alpha: self.alpha },
        })
    }

    fn spread(&self, path: &Path, answers: &VoteFile, method: &Method) -> Result<Spread> {
        let columns = answers.classifiers();
        let is_bagging = matches!(method, Method::Bagging(_));
        let k = match self.k {
            Some(k) => k,
            None if is_bagging => columns,
            None => return Err(Error::Config(format!("--method {} needs --k", method.name()))),
        };
        let d = match self.d {
            Some(d) => d,
            None if *method == Method::Dpa || !method.follows_spread() => 1,
            None => return Err(Error::Config(format!("--method {} needs --d", method.name()))),
        };
        let checked = Spread::new(k, d)?;
        if (method.follows_spread() || self.k.and(self.d).is_some()) && columns != checked.n() {
            let reason = format!("holds answers of {columns} classifiers, expected k·d = {k}·{d} = {}", checked.n());
            return Err(Error::format(path, reason));
        }
        match &answers.offsets {
            Some(offsets) if method.follows_spread() => Spread::with_offsets(k, d, offsets.clone())
                .map_err(|error| Error::format(path, format!("offsets: {error}"))),
            _ => Ok(checked),
        }
    }
}

impl Outputs {
    /// Sends what was not sent elsewhere to the folder of a run.
    fn fill(&mut self, folder: &Path, method: &str) {
        let outputs = [(&mut self.json, "json"), (&mut self.csv, "csv"), (&mut self.plot, "svg")];
        for (output, extension) in outputs {
            output.get_or_insert_with(|| folder.join(format!("certified-{method}.{extension}")));
        }
    }

    /// Prints the report and writes the files asked for. `companions` are drawn beside it.
    pub fn write(&self, report: &Report, companions: Vec<Report>) -> Result<()> {
        let mut drawn = vec![(report.title(), report.clone())];
        drawn.extend(companions.into_iter().map(|companion| (companion.title(), companion)));
        for path in &self.beside {
            let beside = match path.is_dir() {
                true => certified_run(path)?,
                false => read_report(path)?,
            };
            drawn.push((format!("{} ({})", beside.title(), path.display()), beside));
        }
        if let Some(path) = &self.json {
            write_atomically(path, report.to_json()?.as_bytes())?;
        }
        if let Some(path) = &self.csv {
            write_atomically(path, report.to_csv().as_bytes())?;
        }
        if let Some(path) = &self.plot {
            let curves: Vec<CertifiedCurve<'_>> = drawn
                .iter()
                .map(|(name, report)| CertifiedCurve { name, fractions: &report.certified_fraction })
                .collect();
            let title =
                if report.clean_accuracy.is_some() { "Certified fraction" } else { "Stable answers (no labels)" };
            certified_curves(path, title, &curves)?;
        }
        let written = [&self.json, &self.csv, &self.plot].into_iter().flatten();
        let files: String = written.map(|path| format!("{}\n", path.display())).collect();
        let gap = if files.is_empty() { "" } else { "\n" };
        print(&(summary(report) + gap + &files))
    }
}

/// A run by its own method.
fn certified_run(folder: &Path) -> Result<Report> {
    const ALPHA: f64 = 0.001;
    let answers = Answers::read(&[folder])?;
    answers.certify(&answers.method(ALPHA))
}

fn read_report(path: &Path) -> Result<Report> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
    text.parse().map_err(|error: Error| Error::format(path, error.to_string()))
}

/// The report in words, and the curve at about ten sizes.
fn summary(report: &Report) -> String {
    let percent = |share: f64| format!("{:.2} %", 100.0 * share);
    // Titles of methods without a spread have the number of classifiers.
    let classifiers =
        report.spread.as_ref().map_or_else(String::new, |_| format!(", {} classifiers", report.classifiers));
    let mut text = format!(
        "{}: {} samples{classifiers}, {} classes\nguarantee: {}\n",
        report.title(),
        report.samples.len(),
        report.classes,
        report.guarantee
    );
    if let (Some(clean), Some(base)) = (report.clean_accuracy, report.base_accuracy) {
        text += &format!("clean accuracy {}, of single classifiers {}\n", percent(clean), percent(base));
        text += &match report.median_radius {
            Some(radius) => format!("median certified radius {radius} (published as {})\n", radius + 1),
            None => "less than half of the samples are classified right\n".to_owned(),
        };
    }
    if let Some(poison) = report.single_poison {
        text += &format!("one poisoned sample can lose at most {} correct answers at once\n", poison.lost);
    }
    let what = if report.clean_accuracy.is_some() { "certified" } else { "stable" };
    if report.largest_radius() > Report::MAX_SIZE {
        text += &format!("curves in files end at size {}\n", Report::MAX_SIZE);
    }
    let last = report.largest_radius();
    let mut sizes: Vec<usize> = (0..=10).map(|tenth| (last as u128 * tenth / 10) as usize).collect();
    sizes.dedup();
    let mut rows = vec![vec!["poisoned samples".to_owned(), what.to_owned()]];
    rows.extend(sizes.into_iter().map(|size| vec![size.to_string(), percent(report.fraction(size))]));
    text + &table(&rows)
}
