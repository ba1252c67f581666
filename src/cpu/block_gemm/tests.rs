use super::*;
use crate::random::Philox;

fn random(len: usize, seed: u64) -> Vec<f32> {
    (0..len).map(|i| Philox::new(seed).uniform(i as u64) - 0.5).collect()
}

struct Rowwise<'a>(&'a [f32], &'a [f32], [usize; 3]);

impl WithSimd for Rowwise<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
        let Rowwise(left, panel, [count, depth, width]) = self;
        let starts: Vec<usize> = (0..count).map(|row| row * depth).collect();
        let mut data = vec![1.0; count * width];
        let start = vec![0.25; width];
        for (onto, writes, terms) in [
            (Onto::Nothing, Writes::Fetched, 7),
            (Onto::Row(&start), Writes::Streamed, depth),
            (Onto::Row(&start), Writes::Streamed, 5),
            (Onto::Itself, Writes::Near, 8),
        ] {
            let rows = Strided { data: left, stride: &starts[..], columns: depth };
            let (destination, places, ahead) = (&mut data[..], width, contiguous(left));
            let runs = [0];
            Product { rows, runs, count, panel, width, destination, places, onto, writes, terms, ahead }
                .with_simd(simd);
        }
        data
    }
}

struct Transposed<'a>(&'a [f32], &'a [f32], [usize; 3]);

impl WithSimd for Transposed<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
        let Transposed(left, ahead, [columns, depth, width]) = self;
        let right = ahead;
        let mut sums = vec![0.0; columns * width];
        let left = Strided { data: left, stride: columns, columns };
        let right = Strided { data: right, stride: width, columns: width };
        TransposedProduct { left, right, depth, sums: &mut sums, ahead }.with_simd(simd);
        sums
    }
}

#[test]
fn every_instruction_set_matches_the_definition() {
    for width in [LANES, PANEL] {
        for (rows, depth) in [(1, 1), (7, 5), (8, 33), (16, 9), (23, 40)] {
            let (left, right) = (random(rows * depth, 1), random(depth * width, 2));
            for got in simd::with_every_set(|| Rowwise(&left, &right, [rows, depth, width])) {
                for (index, got) in got.iter().enumerate() {
                    let term =
                        |i| f64::from(left[index / width * depth + i]) * f64::from(right[i * width + index % width]);
                    let exact: f64 = (0..depth).map(term).sum();
                    assert!(
                        (f64::from(*got) - 2.0 * exact - 0.25).abs() < 1e-5,
                        "{rows} × {depth} × {width} at {index}"
                    );
                }
            }
            let columns = rows.next_multiple_of(4);
            let left = random(depth * columns, 3);
            for got in simd::with_every_set(|| Transposed(&left, &right, [columns, depth, width])) {
                for (index, got) in got.iter().enumerate() {
                    let term =
                        |t| f64::from(left[t * columns + index / width]) * f64::from(right[t * width + index % width]);
                    let exact: f64 = (0..depth).map(term).sum();
                    assert!((f64::from(*got) - exact).abs() < 1e-5, "{columns} × {depth} × {width} at {index}");
                }
            }
        }
    }
}

#[test]
fn rows_of_a_list_give_the_bits_of_rows_so_far_apart() {
    let (columns, depth, width) = (12, 21, PANEL);
    let (left, right) = (random(depth * columns, 1), random(depth * width, 2));
    let [left_starts, right_starts] = [columns, width].map(|stride| (0..depth).map(|t| t * stride).collect::<Vec<_>>());
    let (mut sums, mut of_lists) = (vec![0.5; columns * width], vec![0.5; columns * width]);
    let left_rows = Strided { data: &left, stride: columns, columns };
    multiply_transposed(left_rows, Strided { data: &right, stride: width, columns: width }, depth, &mut sums, &[]);
    let left_rows = Strided { data: &left, stride: left_starts.as_slice(), columns };
    let right_rows = Strided { data: &right, stride: right_starts.as_slice(), columns: width };
    multiply_transposed(left_rows, right_rows, depth, &mut of_lists, &[]);
    assert_eq!(sums, of_lists);
}

#[test]
fn rows_in_runs_give_the_bits_of_rows_as_a_whole() {
    let (offsets, len, width) = ([0, 40, 83], 5, PANEL);
    let depth = offsets.len() * len;
    let (data, panel, bias) = (random(200, 1), random(depth * width, 2), random(width, 3));
    let starts: Vec<usize> = (0..11).map(|row| row * 3).collect();
    let whole: Vec<f32> = starts
        .iter()
        .flat_map(|start| offsets.iter().flat_map(move |offset| start + offset..start + offset + len))
        .map(|at| data[at])
        .collect();
    let results = [false, true].map(|in_runs| {
        let mut destination = vec![0.0; starts.len() * width];
        let (count, places, writes, onto) = (starts.len(), width, Writes::Near, Onto::Row(&bias[..]));
        let (panel, terms, ahead) = (&panel[..], depth, contiguous(&[]));
        let to = &mut destination[..];
        if in_runs {
            let rows = Strided { data: &data, stride: &starts[..], columns: len };
            let runs = &offsets[..];
            Product { rows, runs, count, panel, width, destination: to, places, onto, writes, terms, ahead }.run();
        } else {
            let rows = Strided { data: &whole, stride: depth, columns: depth };
            let runs = [0];
            Product { rows, runs, count, panel, width, destination: to, places, onto, writes, terms, ahead }.run();
        }
        destination
    });
    assert!(results[0].iter().any(|&value| value != 0.0));
    assert_eq!(results[0], results[1]);
}
