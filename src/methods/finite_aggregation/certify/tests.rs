//! Worked examples, and radii against brute force.

use proptest::prelude::*;

use super::super::{ScoreValues, Scores, Spread, Votes};
use super::*;

/// One sample.
fn votes(classes: usize, row: &[u16]) -> Votes {
    Votes::new(1, row.len(), classes, row.to_vec()).unwrap()
}

fn spread(k: usize, offsets: &[usize]) -> Spread {
    Spread::with_offsets(k, offsets.len(), offsets.to_vec()).unwrap()
}

/// Prediction, and the radii of Finite Aggregation, the coarse bound and enumeration.
fn radii(votes: &Votes, spread: &Spread) -> (usize, [usize; 3]) {
    let all = [finite_aggregation(votes, spread), coarse(votes, spread), exact(votes, spread)].map(|r| r.unwrap()[0]);
    assert!(all.iter().all(|certificate| certificate.prediction == all[0].prediction));
    (all[0].prediction, all.map(|certificate| certificate.radius))
}

/// Scores of one sample from rankings, best class first.
fn rankings(rows: &[&[usize]]) -> Scores {
    let classes = rows[0].len();
    let mut scores = vec![0i64; rows.len() * classes];
    for (row, scores) in rows.iter().zip(scores.chunks_exact_mut(classes)) {
        row.iter().enumerate().for_each(|(place, &class)| scores[class] = (classes - place) as i64);
    }
    Scores::new(1, rows.len(), classes, ScoreValues::I64(scores)).unwrap()
}

#[test]
fn worked_examples_of_dpa() {
    for (classes, row, prediction, radius) in [
        (3, &[0, 0, 0, 1, 2][..], 0, 1),
        (3, &[1, 1, 1, 0, 2], 1, 0),
        (2, &[0, 0, 1, 1], 0, 0),
        (4, &[2, 2, 2, 2], 2, 1),
    ] {
        let votes = votes(classes, row);
        assert_eq!(dpa(&votes), [Certificate { prediction, radius }], "{row:?}");
        assert_eq!(radii(&votes, &spread(row.len(), &[0])), (prediction, [radius; 3]), "{row:?}");
    }
}

#[test]
fn worked_examples_of_finite_aggregation() {
    let pair = |k| spread(k, &[0, 1]);
    let cases: [(&str, usize, &[u16], Spread, usize, [usize; 3]); 9] = [
        ("D", 3, &[0, 0, 1, 0, 0, 2], pair(3), 0, [0, 0, 0]),
        ("D with the published offsets", 3, &[0, 0, 1, 0, 0, 2], Spread::new(3, 2).unwrap(), 0, [0, 0, 0]),
        ("D2", 2, &[0, 0, 0, 0, 0, 1], pair(3), 0, [1, 1, 1]),
        ("E", 5, &[0, 1, 0, 2, 0, 3, 0, 4], pair(4), 0, [1, 0, 1]),
        ("E'", 5, &[4, 0, 4, 1, 4, 2, 4, 3], pair(4), 4, [0, 0, 0]),
        ("G", 5, &[0, 0, 0, 0, 1, 2, 3, 4], pair(4), 0, [0, 0, 0]),
        ("F", 7, &[0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6], pair(7), 0, [1, 1, 2]),
        ("I", 2, &[1, 1, 1], spread(1, &[0, 1, 2]), 1, [0, 0, 0]),
        ("K", 4, &[3; 10], spread(5, &[5, 1]), 3, [2, 2, 2]),
    ];
    for (name, classes, row, spread, prediction, expected) in cases {
        assert_eq!(radii(&votes(classes, row), &spread), (prediction, expected), "{name}");
    }
}

#[test]
fn a_single_class_is_safe_and_abstentions_count_for_nobody() {
    let spread = spread(3, &[0, 1]);
    assert_eq!(radii(&votes(1, &[0; 6]), &spread), (0, [6; 3]));
    // Nobody votes: class 0 wins the tie, and any vote for another ends that.
    assert_eq!(radii(&votes(2, &[2; 6]), &spread), (0, [0; 3]));
    // An abstention moves a margin by 1, so two of them fit where two votes for 0 would not.
    assert_eq!(dpa(&votes(2, &[0, 0, 2, 2]))[0].radius, 1);
}

#[test]
fn worked_examples_of_run_off_election() {
    let certify = |rows: &[&[usize]]| {
        run_off_election(&rankings(rows), &Spread::with_offsets(rows.len(), 1, vec![0]).unwrap()).unwrap()[0]
    };
    let certificate = |prediction, radius| Certificate { prediction, radius };
    let (a, b, c) = (&[0, 1, 2][..], &[2, 1, 0][..], &[1, 0, 2][..]);
    assert_eq!(certify(&[a, a, a, b, b, c, c]), certificate(1, 0));
    assert_eq!(certify(&[a, a, a, a, c, c, &[2, 0, 1]]), certificate(0, 1));
    let (a, b, c, d) = (&[0, 1, 2, 3][..], &[1, 0, 2, 3][..], &[2, 0, 3, 1][..], &[3, 0, 1, 2][..]);
    let thirteen = [a, a, a, a, a, a, a, b, b, c, c, d, d];
    assert_eq!(certify(&thirteen), certificate(0, 3));
    let plain = Votes::from_scores(&rankings(&thirteen)).unwrap();
    assert_eq!(dpa(&plain), [certificate(0, 2)]);
    assert_eq!(certify(&[&[0], &[0]]), certificate(0, 2));
}

#[test]
fn listed_radii_of_bagging() {
    for (winner, runner_up, subset, train, radius) in [
        (0.9, 0.1, 100, 60_000, 305),
        (0.7, 0.2, 30, 60_000, 572),
        (0.6, 0.4, 50, 50_000, 105),
        (0.55, 0.45, 1000, 50_000, 2),
        (0.99, 0.01, 50, 60_000, 802),
    ] {
        assert_eq!(bagging_radius(winner, runner_up, subset, train), Some(radius), "{winner} {runner_up} {subset}");
    }
    assert_eq!(bagging_radius(0.5, 0.5, 30, 60_000), None);
    assert_eq!(bagging_radius(f64::NAN, 0.5, 30, 60_000), None);
    // Powers beyond what a number holds are no obstacle, and neither are subsets of one sample.
    assert_eq!(bagging_radius(0.9, 0.1, 10_000_000, 1000), Some(0));
    assert_eq!(bagging_radius(1.0, 0.0, 1, 1000), Some(499));
    assert_eq!(bagging_radius(1.0, 0.0, 1, 1), Some(0));
}

#[test]
fn bagging_abstains_where_votes_are_split() {
    let row = |ones: usize| (0..1000).map(|i| u16::from(i < ones)).collect::<Vec<u16>>();
    let votes = Votes::new(3, 1000, 2, [row(480), row(700), row(1000)].concat()).unwrap();
    let options = BaggingOptions { subset_size: 30, train_size: 60_000, alpha: 1e-3 };
    let certificates = bagging(&votes, &options).unwrap();
    assert_eq!(certificates[0], None);
    for (sample, count) in [(1, 700), (2, 1000)] {
        let (winner, runner_up) = proportion_bounds(count, Some(1000 - count), 1000, 1e-3 / 6.0);
        assert!(winner < count as f64 / 1000.0 && runner_up <= 1.0 - winner);
        let radius = bagging_radius(winner, runner_up, 30, 60_000).unwrap();
        assert!(radius > 0);
        assert_eq!(certificates[sample], Some(Certificate { prediction: 1, radius }));
    }
    for (subset_size, train_size, alpha) in
        [(0, 1, 0.1), (1, 0, 0.1), (1, 1, 0.0), (1, 1, 1.0), (1, 1, f64::NAN), (1, 1, -0.5)]
    {
        assert!(bagging(&votes, &BaggingOptions { subset_size, train_size, alpha }).is_err());
    }
}

#[test]
fn the_infinite_limit_doubles_small_margins_and_its_bound_is_below() {
    // Shares of 0.5, 0.2, 0.1, 0.1, 0.1: the specification's example, 7 for DPA and 11 in the limit.
    let row: Vec<u16> = (0..1000).map(|i| [0, 0, 0, 0, 0, 1, 1, 2, 3, 4][i % 10]).collect();
    let table = votes(5, &row);
    assert_eq!(infinite_estimate(&table, 50).unwrap()[0].radius, 11);
    let bound = infinite_bound(&table, 50, 0.001).unwrap()[0].unwrap();
    assert!((4..=7).contains(&bound.radius), "{bound:?}");
    let unanimous = votes(2, &[1; 4000]);
    assert_eq!(infinite_estimate(&unanimous, 50).unwrap()[0], Certificate { prediction: 1, radius: 24 });
    assert_eq!(infinite_bound(&votes(2, &[0, 1, 0, 1]), 50, 0.001).unwrap(), [None]);
    assert!(infinite_estimate(&table, 0).is_err() && infinite_bound(&table, 0, 0.1).is_err());
    assert!(infinite_bound(&table, 5, 0.0).is_err());
}

#[test]
fn tables_of_other_ensembles_are_refused() {
    let (table, wrong) = (votes(2, &[0, 1, 0, 1]), spread(3, &[0, 1]));
    let scores = rankings(&[&[0, 1], &[1, 0]]);
    let messages = [
        finite_aggregation(&table, &wrong).unwrap_err(),
        coarse(&table, &wrong).unwrap_err(),
        exact(&table, &wrong).unwrap_err(),
        single_poison(&table, &wrong, &[0]).unwrap_err(),
        run_off_election(&scores, &wrong).unwrap_err(),
    ];
    assert!(messages.iter().all(|message| message.to_string().contains("k·d = 3·2 = 6")), "{messages:?}");
    assert!(single_poison(&table, &spread(2, &[0, 1]), &[0, 0]).unwrap_err().to_string().contains("2 labels"));
    let large = votes(2, &[0; 21]);
    assert!(exact(&large, &Spread::new(21, 1).unwrap()).unwrap_err().to_string().contains("at most 20"));
}

/// A small ensemble: spread, number of classes, and votes on a few samples, abstentions among them.
fn ensembles() -> impl Strategy<Value = (Spread, Votes)> {
    (1usize..6, 1usize..5, 1usize..5, any::<u64>())
        .prop_filter("few enough to enumerate", |(k, d, _, _)| k * d <= 12)
        .prop_flat_map(|(k, d, classes, _)| {
            let n = k * d;
            let offsets = Just((0..n).collect::<Vec<_>>()).prop_shuffle().prop_map(move |all| all[..d].to_vec());
            // Mostly the first class, so that there are radii above 0.
            let vote = prop_oneof![3 => Just(0), 2 => 0..=classes as u16];
            let values = prop::collection::vec(vote, 3 * n);
            (offsets, values).prop_map(move |(offsets, values)| {
                (Spread::with_offsets(k, d, offsets).unwrap(), Votes::new(3, n, classes, values).unwrap())
            })
        })
}

/// Classifiers that any of `buckets` feeds.
fn reached(spread: &Spread, buckets: &[usize]) -> Vec<usize> {
    let mut reached: Vec<usize> = buckets.iter().flat_map(|&bucket| spread.classifiers_of(bucket)).collect();
    reached.sort_unstable();
    reached.dedup();
    reached
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn coarse_is_below_finite_aggregation_and_that_below_enumeration((spread, votes) in ensembles()) {
        let fa = finite_aggregation(&votes, &spread).unwrap();
        let [coarse, exact] = [coarse(&votes, &spread), exact(&votes, &spread)].map(Result::unwrap);
        for ((fa, coarse), exact) in fa.iter().zip(&coarse).zip(&exact) {
            prop_assert!(coarse.radius <= fa.radius && fa.radius <= exact.radius, "{coarse:?} {fa:?} {exact:?}");
            if spread.d() == 1 {
                prop_assert!(coarse == fa && fa == exact);
            }
        }
        if spread.d() == 1 {
            prop_assert_eq!(fa, dpa(&votes));
        }
    }

    #[test]
    fn radii_do_not_depend_on_where_classifiers_start((spread, votes) in ensembles(), shift in 0usize..12) {
        let rows = votes.values().chunks_exact(spread.n()).map(|row| {
            let mut row = row.to_vec();
            row.rotate_left(shift % spread.n());
            row
        });
        let turned = Votes::new(votes.samples(), spread.n(), votes.classes(), rows.flatten().collect()).unwrap();
        prop_assert_eq!(finite_aggregation(&turned, &spread).unwrap(), finite_aggregation(&votes, &spread).unwrap());
        prop_assert_eq!(exact(&turned, &spread).unwrap(), exact(&votes, &spread).unwrap());
    }

    /// A class that nobody votes for, put behind all others, leaves their order alone; its margin is as large as any.
    #[test]
    fn radii_follow_classes_that_keep_their_order((spread, votes) in ensembles()) {
        let (classes, fa) = (votes.classes(), finite_aggregation(&votes, &spread).unwrap());
        // Classes with votes keep their order, and one that is never voted for moves to the end.
        let unused = (0..classes).find(|&class| votes.values().iter().all(|&vote| usize::from(vote) != class));
        let Some(unused) = unused else { return Ok(()) };
        let renamed = |vote: u16| if usize::from(vote) > unused && usize::from(vote) < classes { vote - 1 } else { vote };
        let values = votes.values().iter().map(|&vote| renamed(vote)).collect();
        let moved = Votes::new(votes.samples(), spread.n(), classes, values).unwrap();
        for (old, new) in fa.iter().zip(finite_aggregation(&moved, &spread).unwrap()) {
            prop_assert!(new.radius >= old.radius);
            // With nobody voting at all, the class that answers is the first one, whatever its name.
            prop_assert!(new.prediction == usize::from(renamed(old.prediction as u16)) || old.prediction == unused);
        }
    }

    #[test]
    fn no_poisoning_within_the_radius_changes_the_answer(
        (spread, votes) in ensembles(),
        picks in prop::collection::vec(0usize..1000, 12),
        answers in prop::collection::vec(0usize..1000, 12),
    ) {
        for (sample, certificate) in finite_aggregation(&votes, &spread).unwrap().into_iter().enumerate() {
            let buckets: Vec<usize> = picks[..certificate.radius.min(12)].iter().map(|pick| pick % spread.n()).collect();
            let mut row = votes.of_sample(sample).to_vec();
            // All to the worst rival as well as at random.
            for rival in 0..=votes.classes() {
                for (&classifier, answer) in reached(&spread, &buckets).iter().zip(answers.iter().cycle()) {
                    let answer = if rival < votes.classes() { rival } else { answer % (votes.classes() + 1) };
                    row[classifier] = answer as u16;
                }
                let poisoned = Votes::new(1, spread.n(), votes.classes(), row.clone()).unwrap();
                prop_assert_eq!(plurality(&poisoned.counts(0)), certificate.prediction);
            }
        }
    }

    #[test]
    fn a_single_poison_does_what_all_its_answers_could((spread, votes) in ensembles(), labels in prop::collection::vec(0usize..2, 3)) {
        let labels: Vec<usize> = labels.into_iter().map(|label| label % votes.classes()).collect();
        let found = single_poison(&votes, &spread, &labels).unwrap();
        let lost = |bucket: usize| {
            (0..votes.samples()).filter(|&sample| {
                let wins = |row: &[u16], class| {
                    let votes = Votes::new(1, row.len(), votes.classes(), row.to_vec()).unwrap();
                    plurality(&votes.counts(0)) == class
                };
                let row = votes.of_sample(sample);
                let turned = |rival: usize| {
                    let mut row = row.to_vec();
                    spread.classifiers_of(bucket).for_each(|classifier| row[classifier] = rival as u16);
                    !wins(&row, labels[sample])
                };
                wins(row, labels[sample]) && (0..votes.classes()).any(turned)
            }).count()
        };
        prop_assert_eq!(found.lost, (0..spread.n()).map(lost).max().unwrap());
        prop_assert_eq!(found.lost, lost(found.bucket));
    }

}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Every way in which the classifiers of any buckets may rank the classes, for tiny ensembles.
    #[test]
    fn run_off_radii_are_below_enumeration(
        (k, d, offset) in prop_oneof![Just((5usize, 1usize, 0usize)), Just((4, 1, 0)), Just((3, 2, 1)), Just((3, 2, 2)), Just((2, 2, 1))],
        rows in prop::collection::vec(0usize..6, 6),
    ) {
        const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
        let n = k * d;
        let spread = spread(k, &[0, offset][..d]);
        let answer = |rows: &[usize]| {
            let counts = [0, 1, 2].map(|class| rows.iter().filter(|&&row| ORDERS[row][0] == class).count());
            let mut order = [0, 1, 2];
            order.sort_by_key(|&class| std::cmp::Reverse(counts[class]));
            let (a, b) = (order[0].min(order[1]), order[0].max(order[1]));
            let before = |row: &usize| ORDERS[*row].iter().position(|&c| c == a) < ORDERS[*row].iter().position(|&c| c == b);
            if 2 * rows.iter().filter(|row| before(row)).count() >= n { a } else { b }
        };
        let rows = &rows[..n];
        let scores = rankings(&rows.iter().map(|&row| &ORDERS[row][..]).collect::<Vec<_>>());
        let certificate = run_off_election(&scores, &spread).unwrap()[0];
        prop_assert_eq!(certificate.prediction, answer(rows));
        for set in 0usize..1 << n {
            let buckets: Vec<usize> = (0..n).filter(|bucket| set >> bucket & 1 == 1).collect();
            let reached = reached(&spread, &buckets);
            if buckets.len() > certificate.radius || reached.len() > 4 {
                continue;
            }
            for code in 0..6usize.pow(reached.len() as u32) {
                let (mut poisoned, mut code) = (rows.to_vec(), code);
                for &classifier in &reached {
                    poisoned[classifier] = code % 6;
                    code /= 6;
                }
                prop_assert_eq!(answer(&poisoned), certificate.prediction, "{:?} {:?}", buckets, poisoned);
            }
        }
    }
}
