//! The digits that come with the crate.

use super::{InMemory, Split};
use crate::random::Philox;
use crate::{Error, Result};

const SIDE: usize = 8;
const CLASSES: usize = 10;

/// The 1,797 handwritten 8×8 digits of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998).
/// One fifth of every class is held out, by a draw that never changes; writers are not kept apart.
pub(super) fn open(split: Split) -> Result<InMemory> {
    let digits = smartcore::dataset::digits::load_dataset();
    let mut of_class = vec![Vec::new(); CLASSES];
    for (index, &label) in digits.target.iter().enumerate() {
        of_class
            .get_mut(label as usize)
            .ok_or_else(|| Error::argument("data::open", format!("builtin digit {index} has label {label}")))?
            .push(index);
    }
    let mut chosen = Vec::new();
    for (class, indices) in of_class.iter().enumerate() {
        let order = Philox::new(0).stream("builtin").fork(class as u64).permutation(indices.len());
        let (test, train) = order.split_at(indices.len() / 5);
        let part = if split == Split::Test { test } else { train };
        chosen.extend(part.iter().map(|&i| indices[i]));
    }
    chosen.sort_unstable();
    let size = SIDE * SIDE;
    let pixels = chosen.iter().flat_map(|&i| &digits.data[i * size..(i + 1) * size]).map(|&ink| {
        // 0 to 16 is the number of inked dots of a 4×4 block.
        (ink * (255.0 / 16.0)).round() as u8
    });
    let labels = chosen.iter().map(|&i| digits.target[i] as usize).collect();
    let names = (0..CLASSES).map(|digit| digit.to_string()).collect();
    InMemory::new("builtin", names, [SIDE, SIDE, 1], pixels.collect(), labels)
}

#[cfg(test)]
mod tests {
    use super::super::Dataset;
    use super::*;

    #[test]
    fn both_parts_hold_every_class_and_together_every_digit() {
        let (train, test) = (open(Split::Train).unwrap(), open(Split::Test).unwrap());
        assert_eq!(train.len() + test.len(), 1797);
        assert!((350..=360).contains(&test.len()), "{}", test.len());
        let mut held_out = [0usize; CLASSES];
        for index in 0..test.len() {
            held_out[test.sample(index).unwrap().1] += 1;
        }
        assert!(held_out.iter().all(|count| (34..=37).contains(count)), "{held_out:?}");
        let darkest = (0..train.len()).flat_map(|i| train.sample(i).unwrap().0.pixels).max();
        assert_eq!(darkest, Some(255));
    }
}
