//! The order of an epoch, for any number of rows, in no memory: a keyed permutation.
//!
//! A Feistel network over the smallest even number of bits that holds all rows, walked along its
//! cycle until it lands on a row. `key` is `mix(mix(seed + GOLDEN) ^ epoch)`; round r maps the
//! halves (L, R) to (R, L ^ (mix(key + r ^ R) & mask)), with SplitMix64's `mix`.

use crate::view::{GOLDEN, mix};

const ROUNDS: u64 = 6;

/// A permutation of 0 to `rows` - 1.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    rows: u64,
    key: u64,
    half: u32,
}

impl Order {
    pub fn new(rows: u64, seed: u64, epoch: u64) -> Order {
        let bits = 64 - rows.saturating_sub(1).leading_zeros();
        let half = bits.div_ceil(2).max(1);
        Order { rows, key: mix(mix(seed.wrapping_add(GOLDEN)) ^ epoch), half }
    }

    /// The row at a place of the epoch; `place` must be below the number of rows.
    pub fn row(&self, place: u64) -> u64 {
        assert!(place < self.rows, "place {place} of {}", self.rows);
        let mut row = self.step(place);
        while row >= self.rows {
            row = self.step(row);
        }
        row
    }

    fn step(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half) - 1;
        let (mut left, mut right) = (value >> self.half, value & mask);
        for round in 0..ROUNDS {
            let next = left ^ (mix(self.key.wrapping_add(round) ^ right) & mask);
            (left, right) = (right, next);
        }
        left << self.half | right
    }
}

/// How many of `rows` fall to `rank` of `world` ranks: every place belongs to exactly one.
pub fn share(rows: u64, rank: u64, world: u64) -> u64 {
    rows.saturating_sub(rank).div_ceil(world)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_comes_once() {
        for rows in [1, 2, 3, 5, 64, 65, 1000, 4097] {
            let order = Order::new(rows, 7, 3);
            let mut seen = vec![false; rows as usize];
            for place in 0..rows {
                let row = order.row(place) as usize;
                assert!(!std::mem::replace(&mut seen[row], true), "{rows}: {row} twice");
            }
        }
    }

    #[test]
    fn epochs_and_seeds_differ_and_are_spread() {
        let rows = 10_000;
        let orders = [(0, 0), (0, 1), (1, 0)].map(|(s, e)| Order::new(rows, s, e));
        let same = (0..rows).filter(|&p| orders[0].row(p) == orders[1].row(p)).count();
        assert!(same < 10, "{same} places are shared");
        for order in orders {
            // The mean distance of neighbours is a third of the range in a random order.
            let steps = (1..rows).map(|p| order.row(p).abs_diff(order.row(p - 1)));
            let mean = steps.sum::<u64>() / (rows - 1);
            assert!((3200..3470).contains(&mean), "{mean}");
        }
    }

    #[test]
    fn huge_orders_work() {
        for rows in [100_000_000, u64::MAX / 2] {
            let order = Order::new(rows, 0, 0);
            assert!((0..100).all(|p| order.row(p) < rows && order.row(rows - 1 - p) < rows));
        }
    }

    #[test]
    fn shares_add_up() {
        for (rows, world) in [(10, 3), (2, 5), (0, 2), (9, 9)] {
            assert_eq!((0..world).map(|r| share(rows, r, world)).sum::<u64>(), rows);
        }
    }
}
