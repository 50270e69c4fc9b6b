// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tests of the time series: averages, rates, restarts, gaps, bounds.

use super::*;

/// A Thursday at midnight, the beginning of a step of every ring (weeks count from 1970).
const START: u64 = 604_800 * 2_900;

fn metrics() -> (tempfile::TempDir, Metrics) {
    let directory = tempfile::tempdir().unwrap();
    let metrics = Metrics::open(directory.path()).unwrap();
    (directory, metrics)
}

fn storage() -> Series {
    Series::Storage("n1".into(), "local".into())
}

fn guest() -> Series {
    Series::Guest("100".parse().unwrap())
}

async fn hour(metrics: &Metrics, series: &Series, kind: Consolidation, now: u64) -> Vec<Row> {
    metrics
        .query(series, Timeframe::Hour, kind, now)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_step_has_its_average_and_maximum() {
    let (_directory, metrics) = metrics();
    for (second, used) in [(0, 10.0), (20, 20.0), (40, 60.0), (60, 5.0)] {
        metrics.record(&storage(), START + second, &[Some(100.0), Some(used)]);
    }
    let rows = hour(&metrics, &storage(), Consolidation::Average, START + 61).await;
    assert_eq!(rows.len(), 60);
    assert_eq!(
        rows[58],
        Row {
            time: START,
            values: vec![Some(100.0), Some(30.0)]
        }
    );
    assert_eq!(rows[59].values[1], Some(5.0));
    assert_eq!(rows[0].values, [None, None]);
    let rows = hour(&metrics, &storage(), Consolidation::Max, START + 61).await;
    assert_eq!(rows[58].values[1], Some(60.0));
}

#[tokio::test]
async fn counters_become_rates_and_resets_are_no_peaks() {
    let (_directory, metrics) = metrics();
    let netin = GUEST_COLUMNS
        .iter()
        .position(|c| c.name == "netin")
        .unwrap();
    let mut sample = vec![None; GUEST_COLUMNS.len()];
    for (minute, count) in [(0, 1_000.0), (1, 7_000.0), (2, 50.0), (3, 650.0)] {
        sample[netin] = Some(count);
        metrics.record(&guest(), START + 60 * minute, &sample);
    }
    let rows = hour(&metrics, &guest(), Consolidation::Average, START + 180).await;
    let rates: Vec<_> = rows[56..].iter().map(|row| row.values[netin]).collect();
    assert_eq!(rates, [None, Some(100.0), None, Some(10.0)]);
}

#[tokio::test]
async fn a_restart_goes_on_where_it_was() {
    let (directory, first) = metrics();
    for minute in 0..10 {
        first.record(&storage(), START + 60 * minute, &[Some(1.0), Some(10.0)]);
    }
    first.flush().await.unwrap();
    let second = Metrics::open(directory.path()).unwrap();
    for minute in 10..20 {
        second.record(&storage(), START + 60 * minute, &[Some(1.0), Some(20.0)]);
    }
    let now = START + 20 * 60;
    let day = second
        .query(&storage(), Timeframe::Day, Consolidation::Average, now)
        .await
        .unwrap();
    assert_eq!(day.iter().filter(|row| row.values[1].is_some()).count(), 20);
    let week = second
        .query(&storage(), Timeframe::Week, Consolidation::Average, now)
        .await
        .unwrap();
    let average = week.last().unwrap().values[1].unwrap();
    assert!((average - 15.0).abs() < 1e-6, "{average}");
    second.flush().await.unwrap();
    let third = Metrics::open(directory.path()).unwrap();
    let week = third
        .query(&storage(), Timeframe::Week, Consolidation::Max, now)
        .await
        .unwrap();
    assert_eq!(week.last().unwrap().values[1], Some(20.0));
}

#[tokio::test]
async fn files_keep_their_size_and_old_rows_fall_out() {
    let (directory, metrics) = metrics();
    for day in 0..30 {
        for minute in (0..1440).step_by(30) {
            let time = START + day * 86_400 + minute * 60;
            metrics.record(&storage(), time, &[Some(1.0), Some(1.0)]);
        }
        metrics.flush().await.unwrap();
    }
    let size = std::fs::metadata(directory.path().join("storage-n1-local"))
        .unwrap()
        .len();
    assert!(size <= 16 + (1440 + 1440 + 1464 + 522) * 32, "{size}");
    let now = START + 30 * 86_400;
    let rows = metrics
        .query(&storage(), Timeframe::Month, Consolidation::Average, now)
        .await
        .unwrap();
    assert_eq!(
        rows.iter().filter(|row| row.values[0].is_some()).count(),
        1439
    );
    let much_later = now + 400 * 86_400;
    let rows = metrics
        .query(
            &storage(),
            Timeframe::Year,
            Consolidation::Average,
            much_later,
        )
        .await;
    assert!(rows.unwrap().iter().all(|row| row.values[0].is_none()));
}

#[tokio::test]
async fn a_broken_file_is_replaced_and_a_removed_series_is_gone() {
    let (directory, metrics) = metrics();
    let path = directory.path().join("storage-n1-local");
    std::fs::write(&path, "nonsense").unwrap();
    metrics.record(&storage(), START, &[Some(1.0), None]);
    metrics.flush().await.unwrap();
    let rows = hour(&metrics, &storage(), Consolidation::Average, START).await;
    assert_eq!(rows[59].values, [Some(1.0), None]);
    metrics.remove(&storage());
    assert!(!path.exists());
    let rows = hour(&metrics, &storage(), Consolidation::Average, START).await;
    assert!(rows.iter().all(|row| row.values == [None, None]));
}

#[tokio::test]
async fn series_of_guests_that_are_gone_go_too() {
    let (directory, metrics) = metrics();
    metrics.record(&storage(), START, &[None, None]);
    metrics.record(&guest(), START, &[Some(0.5)]);
    metrics.flush().await.unwrap();
    metrics.retain_guests(|_| true);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
    metrics.retain_guests(|id| id != "100".parse().unwrap());
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    metrics.flush().await.unwrap();
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}
