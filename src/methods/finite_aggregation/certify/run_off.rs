//! Run-off election on top of partitions (Rezaei et al., ICML 2023).

use rayon::prelude::*;

use super::super::{Scores, Spread};
use super::windows::Windows;
use super::{Certificate, check_scores, others, plurality};
use crate::Result;

/// Run-off election and its certificate (section 9.1 of the specification), for any spreading degree.
///
/// In the first round every classifier votes for its best class. The two classes with the most votes go on, and in the
/// second round every classifier votes for the one of them that it scores higher. Of equals the smaller class wins, in
/// both rounds and in each classifier's own scores.
///
/// To lose, the answer `p` must be overtaken by two classes in the first round, or meet in the second a class that
/// beats it there. The radius is one less than the fewest buckets that could bring about either.
///
/// Where there is but one class the radius is the number of classifiers.
///
/// # Errors
/// `Shape` where the scores are not those of the spread's classifiers.
pub fn run_off_election(scores: &Scores, spread: &Spread) -> Result<Vec<Certificate>> {
    check_scores("run_off_election", scores, spread)?;
    let certify = |windows: &mut Windows, sample| {
        if scores.classes() == 1 {
            return Certificate { prediction: 0, radius: spread.n() };
        }
        let mut election = Election::new(scores, sample, windows);
        let second_round = election.losing_second_round();
        let losing = election.losing_first_round(second_round);
        Certificate { prediction: election.winner, radius: losing - 1 }
    };
    Ok((0..scores.samples()).into_par_iter().map_init(|| Windows::new(spread), certify).collect())
}

/// One sample's election. A gap is the number of votes that a class is ahead of another, counted so that it stays ahead
/// as long as the gap is above 0.
struct Election<'a, 'b> {
    scores: &'a Scores,
    sample: usize,
    /// First votes, one for each classifier.
    votes: Vec<u16>,
    counts: Vec<usize>,
    winner: usize,
    other_finalist: usize,
    windows: &'a mut Windows<'b>,
}

impl<'a, 'b> Election<'a, 'b> {
    /// Both rounds. There are at least two classes.
    fn new(scores: &'a Scores, sample: usize, windows: &'a mut Windows<'b>) -> Self {
        let votes = scores.tops(sample);
        let mut counts = vec![0; scores.classes()];
        votes.iter().for_each(|&vote| counts[usize::from(vote)] += 1);
        let first = plurality(&counts);
        let better = |a: usize, b: usize| if counts[b] > counts[a] { b } else { a };
        let second = others(counts.len(), first).reduce(better).unwrap_or(first);
        let mut election = Election { scores, sample, votes, counts, winner: first, other_finalist: second, windows };
        if election.second_round_gap(first, second, &scores.prefers(sample, first, second)) == 0 {
            (election.winner, election.other_finalist) = (second, first);
        }
        election
    }

    /// How far `a` is ahead of `b` in first votes; negative where it is behind.
    fn gap(&self, a: usize, b: usize) -> isize {
        self.counts[a] as isize - self.counts[b] as isize + isize::from(b > a)
    }

    /// How far `a` is ahead of `b` where both are finalists; `prefers` tells of each classifier whether it prefers `a`.
    fn second_round_gap(&self, a: usize, b: usize, prefers: &[bool]) -> usize {
        let for_a = prefers.iter().filter(|&&prefers| prefers).count();
        (2 * for_a + usize::from(b > a)).saturating_sub(prefers.len())
    }

    /// Buckets for `b` to overtake `a` in first votes; `None` where nothing can.
    fn overtaking(&mut self, a: usize, b: usize) -> Option<usize> {
        let (first, second) = (a as u16, b as u16);
        let weights = self.votes.iter().map(|&vote| 1 + u8::from(vote == first) - u8::from(vote == second));
        let gap = self.gap(a, b).max(0).unsigned_abs();
        self.windows.fewest(gap, weights)
    }

    /// Buckets for another class to meet the winner in the second round and win it.
    fn losing_second_round(&mut self) -> usize {
        let (winner, other) = (self.winner, self.other_finalist);
        let mut fewest = usize::MAX;
        for challenger in others(self.counts.len(), winner) {
            let entry = if challenger == other { Some(0) } else { self.overtaking(other, challenger) };
            let Some(entry) = entry.filter(|&entry| entry < fewest) else { continue };
            let prefers = self.scores.prefers(self.sample, winner, challenger);
            let gap = self.second_round_gap(winner, challenger, &prefers);
            let victory = self.windows.fewest(gap, prefers.iter().map(|&prefers| 2 * u8::from(prefers)));
            fewest = fewest.min(victory.map_or(usize::MAX, |victory| victory.max(entry)));
        }
        fewest
    }

    /// Buckets for two classes to overtake the winner in the first round, if that is less than `fewest`, and else that.
    fn losing_first_round(&mut self, mut fewest: usize) -> usize {
        let winner = self.winner;
        let mut alone: Vec<(usize, usize)> = Vec::new();
        for class in others(self.counts.len(), winner) {
            alone.extend(self.overtaking(winner, class).map(|buckets| (buckets, class)));
        }
        alone.sort_unstable();
        for (index, &(buckets, v)) in alone.iter().enumerate().skip(1) {
            // Overtaking by `v` alone takes that many already, and by those behind it no less.
            if buckets >= fewest {
                break;
            }
            for &(_, u) in &alone[..index] {
                fewest = fewest.min(self.overtaken_by_both(u, v).map_or(usize::MAX, |both| both.max(buckets)));
            }
        }
        fewest
    }

    /// Buckets that close the gaps of both classes, taken together. One may be negative: what its class is ahead by, the
    /// other may win from it.
    fn overtaken_by_both(&mut self, u: usize, v: usize) -> Option<usize> {
        let [winner, first, second] = [self.winner, u, v].map(|class| class as u16);
        let gaps = (self.gap(self.winner, u) + self.gap(self.winner, v)).max(0).unsigned_abs();
        let weight = |&vote: &u16| 1 + 2 * u8::from(vote == winner) - u8::from(vote == first || vote == second);
        self.windows.fewest(gaps, self.votes.iter().map(weight))
    }
}
