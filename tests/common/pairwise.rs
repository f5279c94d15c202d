//! Few combinations of many factors, such that every pair of values occurs that can occur.

use std::collections::BTreeSet;

/// A combination: one value of each factor, as its index.
pub(crate) type Row = Vec<usize>;

/// Values of some of the factors: the factor and its value, each.
type Part = Vec<(usize, usize)>;

/// At most `most` combinations of factors with so many values each, out of those that
/// `is_possible`: all pairs of values, then as many triples as there is room for. Always the same
/// ones: the next is the first of those that bring the most new pairs, and of these triples.
///
/// # Panics
/// If all pairs take more than `most`.
pub(crate) fn pairwise(
    values: &[usize],
    most: usize,
    is_possible: impl Fn(&[usize]) -> bool,
) -> Vec<Row> {
    let mut all = every(values, is_possible);
    let parts = |part: fn(&Row) -> Vec<Part>| all.iter().flat_map(part).collect::<BTreeSet<_>>();
    let (mut new_pairs, mut new_triples) = (parts(pairs), parts(triples));
    // The last one that is largest is found: the first of a reversed list.
    all.reverse();
    let mut rows: Vec<Row> = Vec::new();
    while rows.len() < most && !new_triples.is_empty() {
        let gain = |row: &&Row| {
            let count = |parts: Vec<Part>, new: &BTreeSet<Part>| {
                parts.iter().filter(|part| new.contains(*part)).count()
            };
            let pairs = count(pairs(row), &new_pairs);
            (pairs, count(triples(row), &new_triples))
        };
        let Some(best) = all.iter().max_by_key(gain).cloned() else {
            break;
        };
        for pair in pairs(&best) {
            new_pairs.remove(&pair);
        }
        for triple in triples(&best) {
            new_triples.remove(&triple);
        }
        rows.push(best);
    }
    assert!(new_pairs.is_empty(), "{most} are too few for all pairs");
    rows
}

/// All possible combinations, the last factor changing fastest.
pub(crate) fn every(values: &[usize], is_possible: impl Fn(&[usize]) -> bool) -> Vec<Row> {
    let mut rows = vec![Row::new()];
    for count in values {
        let longer = |row: &Row| {
            let row = row.clone();
            (0..*count).map(move |value| [&row[..], &[value]].concat())
        };
        rows = rows.iter().flat_map(longer).collect();
    }
    rows.retain(|row| is_possible(row));
    rows
}

/// Any two factors of a row.
fn pairs(row: &Row) -> Vec<Part> {
    let at = |factor: usize| (factor, row[factor]);
    (0..row.len())
        .flat_map(|a| (0..a).map(move |b| vec![at(b), at(a)]))
        .collect()
}

/// Any three.
fn triples(row: &Row) -> Vec<Part> {
    let longer = |pair: Part| {
        let last = pair[1].0;
        (last + 1..row.len()).map(move |factor| {
            let third = (factor, row[factor]);
            [&pair[..], &[third]].concat()
        })
    };
    pairs(row).into_iter().flat_map(longer).collect()
}
