// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tests of the task engine: ends, stops, restarts, pages, bounds, and the undo of steps.

use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use super::*;
use crate::step;

fn tasks(directory: &Path) -> Tasks {
    Tasks::open("n1", directory, 3).unwrap()
}

fn lines(tasks: &Tasks, upid: &Upid) -> Vec<String> {
    let page = tasks.log(upid, 0, 0).unwrap();
    page.lines.into_iter().map(|(_, text)| text).collect()
}

#[tokio::test]
async fn a_task_ends_with_its_status_and_log() {
    let directory = tempfile::tempdir().unwrap();
    let tasks = tasks(directory.path());
    let new = || NewTask::new("qmstart", 100, "admin@pve!ci");
    let good = tasks
        .spawn(new(), async |task| {
            task.log("two\nlines");
            Ok(())
        })
        .unwrap();
    let warned = tasks
        .spawn(new(), async |task| {
            task.warn("odd");
            Ok(())
        })
        .unwrap();
    let failed = tasks
        .spawn(new(), async |_| {
            Err(Error::failed("start the VMM", std::io::Error::other("no")))
        })
        .unwrap();
    assert_eq!(tasks.wait(&good).await.unwrap(), "OK");
    assert_eq!(tasks.wait(&warned).await.unwrap(), "WARNINGS: 1");
    assert_eq!(tasks.wait(&failed).await.unwrap(), "start the VMM: no");
    assert_eq!(lines(&tasks, &good), ["two", "lines", "TASK OK"]);
    assert_eq!(lines(&tasks, &warned), ["WARN: odd", "TASK WARNINGS: 1"]);
    assert_eq!(lines(&tasks, &failed), ["TASK ERROR: start the VMM: no"]);
    assert_eq!(good.to_string().split(':').nth(7), Some("admin@pve!ci"));
    assert!(good != warned && warned != failed);
}

#[tokio::test]
async fn a_stopped_task_ends_and_frees_its_worker() {
    let directory = tempfile::tempdir().unwrap();
    let tasks = tasks(directory.path());
    let sleep = async |task: TaskContext| {
        let forever = std::future::pending::<Result<(), Error>>();
        task.until_cancelled(forever).await
    };
    let new = || NewTask::new("vzdump", "", "root@pam");
    let upids: Vec<Upid> = (0..4).map(|_| tasks.spawn(new(), sleep).unwrap()).collect();
    let free = tasks.spawn(new().free(), async |_| Ok(())).unwrap();
    assert_eq!(tasks.wait(&free).await.unwrap(), "OK");
    assert_eq!(tasks.running_count(), 4);
    assert_eq!(tasks.status(&upids[0]).unwrap().status(), "RUNNING");
    for upid in &upids {
        tasks.stop(upid).unwrap();
        assert_eq!(tasks.wait(upid).await.unwrap(), crate::error::INTERRUPTED);
    }
    tasks.stop(&upids[0]).unwrap();
    assert_eq!(tasks.running_count(), 0);
}

#[tokio::test]
async fn a_panic_ends_the_task_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let tasks = tasks(directory.path());
    let upid = tasks
        .spawn(NewTask::new("qmstart", 1, "root@pam"), async |_| {
            panic!("bug")
        })
        .unwrap();
    let status = tasks.wait(&upid).await.unwrap();
    assert!(status.contains("which is a bug"), "{status}");
}

#[tokio::test]
async fn a_restart_keeps_the_record_and_ends_what_ran() {
    let directory = tempfile::tempdir().unwrap();
    let first = tasks(directory.path());
    let new = || NewTask::new("qmstart", 100, "root@pam");
    let done = first.spawn(new(), async |_| Ok(())).unwrap();
    first.wait(&done).await.unwrap();
    let lost = first
        .spawn(new(), async |_| std::future::pending().await)
        .unwrap();
    let second = tasks(directory.path());
    assert_eq!(second.status(&done).unwrap().status(), "OK");
    assert_eq!(second.status(&lost).unwrap().status(), UNEXPECTED);
    assert!(
        lines(&second, &lost)
            .last()
            .unwrap()
            .contains("atolld ended")
    );
    let third = tasks(directory.path());
    assert_eq!(
        lines(&third, &lost).len(),
        1,
        "ended once, not at every start"
    );
    let unknown = TaskFilter {
        classes: vec![StatusClass::Unknown],
        ..TaskFilter::default()
    };
    assert_eq!(third.list(&unknown).1, 1);
}

#[tokio::test]
async fn lists_are_filtered_and_paged() {
    let directory = tempfile::tempdir().unwrap();
    let tasks = tasks(directory.path());
    for id in 100..110 {
        let user = if id % 2 == 0 { "a@pve" } else { "ab@pve!t" };
        let upid = tasks
            .spawn(NewTask::new("qmstart", id, user), async move |_| match id {
                103 => Err(Error::refused("no")),
                _ => Ok(()),
            })
            .unwrap();
        tasks.wait(&upid).await.unwrap();
    }
    let count = |change: fn(&mut TaskFilter)| {
        let mut filter = TaskFilter::default();
        change(&mut filter);
        tasks.list(&filter).1
    };
    assert_eq!(count(|_| ()), 10);
    assert_eq!(count(|f| f.id = Some("104".into())), 1);
    assert_eq!(count(|f| f.owner = Some("a@pve".into())), 5);
    assert_eq!(count(|f| f.owner = Some("ab@pve".into())), 5);
    assert_eq!(count(|f| f.user = Some("pve!t".into())), 5);
    assert_eq!(count(|f| f.kind = Some("qmstop".into())), 0);
    assert_eq!(count(|f| f.classes = vec![StatusClass::Error]), 1);
    assert_eq!(count(|f| f.source = TaskSource::Active), 0);
    let page = TaskFilter {
        start: 2,
        limit: 3,
        ..TaskFilter::default()
    };
    let (records, total) = tasks.list(&page);
    let ids: Vec<_> = records.iter().map(|r| r.upid.id.as_str()).collect();
    assert_eq!((ids, total), (vec!["107", "106", "105"], 10));
}

#[tokio::test]
async fn logs_are_paged() {
    let directory = tempfile::tempdir().unwrap();
    let tasks = tasks(directory.path());
    let upid = tasks
        .spawn(NewTask::new("x", "", "root@pam"), async |task| {
            (1..10).for_each(|n| task.log(&format!("line {n}")));
            Ok(())
        })
        .unwrap();
    tasks.wait(&upid).await.unwrap();
    let page = tasks.log(&upid, 3, 2).unwrap();
    assert_eq!(page.total, 10);
    assert_eq!(
        page.lines,
        [(4, "line 4".to_owned()), (5, "line 5".to_owned())]
    );
    let other: Upid = "UPID:n1:0000A1B2:0012C3D4:65F0AB12:qmstart:100:root@pam:"
        .parse()
        .unwrap();
    assert!(matches!(tasks.log(&other, 0, 0), Err(Error::Invalid(_))));
}

/// A world of three things that exist or do not, and steps that make them.
#[derive(Default)]
struct Made {
    things: Arc<Mutex<Vec<&'static str>>>,
    undone: Arc<AtomicUsize>,
}

impl Made {
    fn add(&self, thing: &'static str) {
        self.things.lock().unwrap().push(thing);
    }
    fn remove(&self, thing: &'static str) {
        self.undone.fetch_add(1, Ordering::Relaxed);
        self.things.lock().unwrap().retain(|t| *t != thing);
    }
}

async fn tap(made: &mut Made, _: &TaskContext) -> Result<(), Error> {
    made.add("tap");
    Ok(())
}
async fn no_tap(made: &mut Made, _: &TaskContext) -> Result<(), Error> {
    made.remove("tap");
    Ok(())
}
async fn disk(made: &mut Made, task: &TaskContext) -> Result<(), Error> {
    task.until_cancelled(async {
        tokio::time::sleep(Duration::from_millis(1)).await;
        Ok(())
    })
    .await?;
    made.add("disk");
    Ok(())
}
async fn no_disk(made: &mut Made, _: &TaskContext) -> Result<(), Error> {
    made.remove("disk");
    Ok(())
}
async fn report(_: &mut Made, task: &TaskContext) -> Result<(), Error> {
    task.log("made");
    Ok(())
}

const STEPS: &[TaskStep<Made>] = &[
    step!("make the tap", tap, undo no_tap),
    step!("make the disk", disk, undo no_disk),
    step!("report", report),
];

#[tokio::test]
async fn steps_are_undone_in_reverse() {
    fault::fails_cleanly(
        STEPS,
        async || {
            let made = Made::default();
            (Arc::clone(&made.things), made)
        },
        async |things| things.lock().unwrap().clone(),
    )
    .await;
}

#[tokio::test]
async fn a_table_runs_as_a_task() {
    let directory = tempfile::tempdir().unwrap();
    let tasks = tasks(directory.path());
    let made = Made::default();
    let things = Arc::clone(&made.things);
    let upid = tasks
        .spawn_steps(NewTask::new("qmcreate", 100, "root@pam"), STEPS, made)
        .unwrap();
    assert_eq!(tasks.wait(&upid).await.unwrap(), "OK");
    assert_eq!(*things.lock().unwrap(), ["tap", "disk"]);
    assert_eq!(lines(&tasks, &upid), ["made", "TASK OK"]);
}

#[test]
fn the_archive_is_bounded_and_the_journal_compacted() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("index");
    let mut index = Index::open(&path).unwrap();
    let upid = |pid| Upid {
        pid,
        ..fault::upid()
    };
    let max = u32::try_from(index::FINISHED_MAX).unwrap();
    let mut dropped = Vec::new();
    for pid in 0..3 * max {
        index.begin(&upid(pid)).unwrap();
        dropped.extend(index.finish(&upid(pid), 7, "OK").unwrap());
    }
    assert_eq!(dropped.len(), 2 * index::FINISHED_MAX);
    let written = std::fs::read_to_string(&path).unwrap().lines().count();
    assert!(written < 4 * index::FINISHED_MAX, "{written}");
    let again = Index::open(&path).unwrap();
    assert!(again.find(&upid(3 * max - 1)).is_some());
    assert!(again.find(&upid(0)).is_none());
}
