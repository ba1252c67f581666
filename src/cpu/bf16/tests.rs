use super::*;
use crate::random::Philox;

fn random(len: usize, seed: u64) -> Vec<bf16> {
    (0..len).map(|i| bf16::from_f32(Philox::new(seed).uniform(i as u64) - 0.5)).collect()
}

fn term(left: bf16, right: bf16) -> f64 {
    f64::from(left) * f64::from(right)
}

/// What `run` makes with the instructions, where they are, and without.
fn on_every_path(product: &Product<'_>, len: usize) -> Vec<(Vec<bf16>, Vec<f32>)> {
    let mut results = Vec::new();
    for portable in [true, false] {
        let run = |to: To<'_>| if portable { portable::multiply(product, to) } else { product.run(to) };
        let (mut narrow, mut wide) = (vec![bf16::ONE; len], vec![1.0; len]);
        run(To::Narrow(&mut narrow));
        run(To::Wide(&mut wide));
        let mut twice = wide.clone();
        run(To::Added(&mut twice));
        for (twice, once) in twice.iter().zip(&wide) {
            assert!(*twice == 2.0 * once || *twice == 1.0, "{twice} for twice {once}");
        }
        results.push((narrow, wide));
    }
    results
}

#[test]
fn every_path_matches_the_definition() {
    for (rows, depth, columns) in [(1, 1, 1), (7, 5, 32), (8, 33, 31), (19, 64, 16), (13, 0, 3), (11, 258, 17)] {
        let (left, right) = (random(rows * depth, 1), random(depth * columns, 2));
        let panels = Panels::of_rows(&right, depth, columns);
        let starts: Vec<usize> = (0..rows).map(|row| row * depth).collect();
        let (data, stride) = (&left[..], columns + 3);
        let panel = panels.view().panel(0);
        for streamed in [false, true] {
            let (start, places) = (&[0.25; PANEL], Places::Apart(stride));
            let product = Product { data, starts: &starts, depth, panel, start, used: columns, places, streamed };
            for (narrow, wide) in on_every_path(&product, rows * stride) {
                for index in 0..rows * stride {
                    let (row, column) = (index / stride, index % stride);
                    if column >= columns {
                        assert_eq!((narrow[index], wide[index]), (bf16::ONE, 1.0), "between rows");
                        continue;
                    }
                    let terms = (0..depth).map(|i| term(left[row * depth + i], right[i * columns + column]));
                    let exact = 0.25 + terms.sum::<f64>();
                    let at = format!("{rows} × {depth} × {columns} at {index}");
                    assert!((f64::from(wide[index]) - exact).abs() < 2e-6, "{at}: {} for {exact}", wide[index]);
                    assert_eq!(narrow[index], bf16::from_f32(wide[index]), "{at}: rounded otherwise");
                }
            }
        }
    }
}

#[test]
fn transposed_products_match_the_definition() {
    for (depth, columns, features) in [(1, 1, 1), (6, 40, 33), (257, 24, 70), (64, 32, 64)] {
        let (left, right) = (random(depth * columns, 1), random(depth * features, 2));
        let (left_panels, right_panels) =
            (Panels::of_rows(&left, depth, columns), Panels::of_rows(&right, depth, features));
        let stride = right_panels.view().sums_stride();
        let mut sums = vec![0.5; columns.next_multiple_of(PANEL) * stride];
        for (panel, sums) in sums.chunks_mut(PANEL * stride).enumerate() {
            left_panels.view().add_transposed(panel, right_panels.view(), sums);
        }
        for index in 0..columns * features {
            let (row, column) = (index / features, index % features);
            let exact: f64 = (0..depth).map(|i| term(left[i * columns + row], right[i * features + column])).sum();
            let got = f64::from(sums[row * stride + column]);
            assert!((got - exact - 0.5).abs() < 1e-5, "{depth} × {columns} × {features}: {got} for {exact}");
        }
        let mut portable = vec![0.5; PANEL * stride];
        let used = PANEL.min(columns).next_multiple_of(GROUP);
        let [left, right] = [&left_panels, &right_panels].map(|panels| panels.view().panel(0).as_chunks().0);
        let left = Strided { data: left, stride: PANEL, columns: used };
        let right = Strided { data: right, stride: PANEL, columns: PANEL };
        portable::add_transposed(left, right, pairs(depth), (&mut portable, stride));
        for (row, (portable, sums)) in portable.chunks(stride).zip(sums.chunks(stride)).take(used).enumerate() {
            for (portable, sum) in portable.iter().zip(sums).take(PANEL) {
                assert!((portable - sum).abs() < 1e-5, "row {row}: {portable} and {sum}");
            }
        }
    }
}

#[test]
fn both_ways_of_packing_agree() {
    for (depth, columns) in [(1, 1), (4, 32), (7, 33), (64, 70)] {
        let matrix = random(depth * columns, 3);
        let transposed: Vec<bf16> = (0..columns * depth).map(|i| matrix[i % depth * columns + i / depth]).collect();
        let by_rows = Panels::of_rows(&matrix, depth, columns);
        assert_eq!(&*by_rows.data, &*Panels::of_columns(&transposed, depth, columns).data, "{depth} × {columns}");
        let mut memory = vec![bf16::ONE; Panels::len(depth, columns) + 5];
        assert_eq!(PanelsView::pack(&matrix, depth, columns, &mut memory).data, &*by_rows.data);
    }
}

#[test]
fn numbers_that_are_not_finite_stay_in_their_row() {
    let mut left = random(8 * 6, 1);
    (left[6], left[13]) = (bf16::NAN, bf16::INFINITY);
    let panels = Panels::of_rows(&[bf16::ONE; 6 * 2], 6, 2);
    let mut to = vec![bf16::ZERO; 8 * 2];
    panels.rows(&left, None, &mut to, false);
    assert!(to[2..4].iter().all(|value| value.is_nan()) && to[4..6].iter().all(|value| *value == bf16::INFINITY));
    assert!(to[..2].iter().chain(&to[6..]).all(|value| value.is_finite()));
}

#[test]
fn conversions_round_as_defined() {
    for bits in (0..=u32::MAX).step_by(4093) {
        let value = f32::from_bits(bits);
        let (got, want) = (narrow(value), bf16::from_f32(value));
        assert!(got == want || (got.is_nan() && want.is_nan()), "{value:e}: {got} for {want}");
    }
    for bits in 0..=u16::MAX {
        let value = bf16::from_bits(bits);
        let (got, want) = (widen(value), f32::from(value));
        assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()), "{value}: {got} for {want}");
    }
}

#[test]
fn rows_anywhere_give_the_sums_of_the_definition() {
    let (columns, depth) = (16, 21);
    for width in [PANEL / 2, PANEL] {
        let (left, right) = (random(2 * (depth * columns + 40), 1), random(2 * (depth * width + 70), 2));
        // Backwards, and with gaps.
        let [left_starts, right_starts] = [(columns, 3), (width, 5)]
            .map(|(stride, gap)| (0..depth).rev().map(|t| t * stride + gap * (t % 2)).collect::<Vec<_>>());
        let left = Strided { data: left.as_chunks::<2>().0, stride: left_starts.as_slice(), columns };
        let right = Strided { data: right.as_chunks::<2>().0, stride: right_starts.as_slice(), columns: width };
        let stride = width + 1;
        let (mut sums, mut portable) = (vec![0.5; columns * stride], vec![0.5; columns * stride]);
        add_transposed(left, right, depth, (&mut sums, stride));
        portable::add_transposed(left, right, depth, (&mut portable, stride));
        for index in 0..columns * stride {
            let (row, column) = (index / stride, index % stride);
            let of_pair = |t: usize| {
                let [a, b] = [left.data[left_starts[t] + row], right.data[right_starts[t] + column]];
                term(a[0], b[0]) + term(a[1], b[1])
            };
            let exact = 0.5 + if column < width { (0..depth).map(of_pair).sum() } else { 0.0 };
            for got in [sums[index], portable[index]] {
                assert!((f64::from(got) - exact).abs() < 1e-5, "{width}, sum {index}: {got} for {exact}");
            }
        }
    }
}

#[test]
fn products_go_to_the_places_of_a_list() {
    let (rows, depth, columns) = (11, 10, 27);
    let (left, right) = (random(rows * depth, 1), random(depth * columns, 2));
    let panels = Panels::of_rows(&right, depth, columns);
    let starts: Vec<usize> = (0..rows).map(|row| row * depth).collect();
    let listed: Vec<usize> = (0..rows).rev().map(|row| row * 40 + row % 3).collect();
    let product = |places| Product {
        data: &left,
        starts: &starts,
        depth,
        panel: panels.view().panel(0),
        start: &[0.25; PANEL],
        used: columns,
        places,
        streamed: false,
    };
    let (mut apart, mut by_list) = (vec![0.0; rows * PANEL], vec![7.0; rows * 40]);
    product(Places::Apart(PANEL)).run(To::Wide(&mut apart));
    product(Places::Listed(&listed)).run(To::Wide(&mut by_list));
    let mut portable = vec![7.0; rows * 40];
    portable::multiply(&product(Places::Listed(&listed)), To::Wide(&mut portable));
    for (row, place) in listed.iter().enumerate() {
        assert_eq!(by_list[*place..place + columns], apart[row * PANEL..][..columns], "row {row}");
    }
    let untouched = |values: &[f32]| values.iter().filter(|&&value| value == 7.0).count();
    assert_eq!([untouched(&by_list), untouched(&portable)], [rows * 40 - rows * columns; 2]);
}
