// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What every engine must do. An engine's tests call [`run`] with a function that makes an empty store.

use std::sync::Arc;

use super::{ConfigStore, Expect, Revision, StoreError, Write};

/// Runs every case on a store of its own.
pub(super) async fn run<S: ConfigStore + 'static>(make: impl Fn() -> Arc<S>) {
    reads_its_writes(make()).await;
    lists_by_prefix(make()).await;
    expectations(make()).await;
    transactions_are_all_or_nothing(make()).await;
    malformed_transactions(make()).await;
    watchers_wake(make()).await;
    racing_writers(make()).await;
    many_keys(make()).await;
}

async fn reads_its_writes(store: Arc<impl ConfigStore>) {
    assert_eq!(store.get("a").unwrap(), None);
    let first = store.put("a", "1".into(), Expect::Any).await.unwrap();
    let second = store.put("a", "".into(), Expect::Any).await.unwrap();
    assert!(second > first);
    let entry = store.get("a").unwrap().unwrap();
    assert_eq!((&*entry.value, entry.revision), (&b""[..], second));
    store.delete("a", Expect::Any).await.unwrap();
    assert_eq!(store.get("a").unwrap(), None);
    assert!(store.delete("a", Expect::Any).await.unwrap() > second);
    assert_eq!(store.barrier().await.unwrap(), store.revision());
}

async fn lists_by_prefix(store: Arc<impl ConfigStore>) {
    for key in ["b", "a/2", "a/1", "a/10", "a", "a0", "ä"] {
        store
            .put(key, key.to_owned().into(), Expect::Any)
            .await
            .unwrap();
    }
    let keys = |prefix| -> Vec<String> {
        let entries = store.list(prefix).unwrap();
        entries.into_iter().map(|entry| entry.key).collect()
    };
    assert_eq!(keys("a/"), ["a/1", "a/10", "a/2"]);
    assert_eq!(keys(""), ["a", "a/1", "a/10", "a/2", "a0", "b", "ä"]);
    assert_eq!(keys("c"), [""; 0]);
}

async fn expectations(store: Arc<impl ConfigStore>) {
    let first = store.put("a", "1".into(), Expect::Absent).await.unwrap();
    let conflict = |result: Result<Revision, StoreError>| {
        assert!(matches!(result, Err(StoreError::Conflict { key }) if key == "a"));
    };
    conflict(store.put("a", "2".into(), Expect::Absent).await);
    let second = store.put("a", "2".into(), Expect::At(first)).await.unwrap();
    conflict(store.put("a", "3".into(), Expect::At(first)).await);
    conflict(store.delete("a", Expect::At(first)).await);
    conflict(store.delete("a", Expect::Absent).await);
    store.delete("a", Expect::At(second)).await.unwrap();
    conflict(store.put("a", "3".into(), Expect::At(second)).await);
    store.put("a", "3".into(), Expect::Absent).await.unwrap();
}

async fn transactions_are_all_or_nothing(store: Arc<impl ConfigStore>) {
    let first = store.put("a", "1".into(), Expect::Any).await.unwrap();
    let move_a = |expect| vec![Write::put("b", "1"), Write::delete("a").expecting(expect)];
    let stale = store
        .transaction(move_a(Expect::At(Revision(first.0 + 9))))
        .await;
    assert!(matches!(stale, Err(StoreError::Conflict { .. })));
    assert_eq!(store.get("b").unwrap(), None);
    assert_eq!(store.revision(), first);
    let moved = store.transaction(move_a(Expect::At(first))).await.unwrap();
    assert_eq!(store.get("a").unwrap(), None);
    assert_eq!(store.get("b").unwrap().unwrap().revision, moved);
    assert_eq!(store.transaction(Vec::new()).await.unwrap(), moved);
}

async fn malformed_transactions(store: Arc<impl ConfigStore>) {
    let long = "k".repeat(super::KEY_LENGTH_MAX + 1);
    let large = vec![0u8; super::VALUE_SIZE_MAX + 1];
    for writes in [
        vec![Write::put("", "1")],
        vec![Write::put(long, "1")],
        vec![Write::put("a", "1"), Write::delete("a")],
        vec![Write::put("a", large)],
    ] {
        let result = store.transaction(writes).await;
        assert!(matches!(result, Err(StoreError::Invalid { .. })));
    }
    assert_eq!(store.list("").unwrap(), []);
}

async fn watchers_wake(store: Arc<impl ConfigStore>) {
    let mut watch = store.watch();
    watch.borrow_and_update();
    let revision = store.put("a", "1".into(), Expect::Any).await.unwrap();
    watch.changed().await.unwrap();
    assert_eq!(*watch.borrow_and_update(), revision);
    let refused = store.put("a", "1".into(), Expect::Absent).await;
    assert!(refused.is_err() && !watch.has_changed().unwrap());
}

/// Eight tasks add to one counter, each by reading, adding and writing at the revision it read.
async fn racing_writers<S: ConfigStore + 'static>(store: Arc<S>) {
    store.put("n", "0".into(), Expect::Any).await.unwrap();
    let add = async |store: Arc<S>| loop {
        let entry = store.get("n").unwrap().unwrap();
        let number: u32 = std::str::from_utf8(&entry.value).unwrap().parse().unwrap();
        let value = (number + 1).to_string().into();
        match store.put("n", value, Expect::At(entry.revision)).await {
            Ok(_) => return,
            Err(StoreError::Conflict { .. }) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..8 {
        tasks.spawn(add(Arc::clone(&store)));
    }
    tasks.join_all().await;
    assert_eq!(&*store.get("n").unwrap().unwrap().value, b"8");
}

async fn many_keys(store: Arc<impl ConfigStore>) {
    let key = |number: u32| format!("nodes/n{}/qemu-server/{number}.conf", number % 10);
    let writes = (100..10_100).map(|n| Write::put(key(n), format!("name: g{n}\n")));
    store.transaction(writes.collect()).await.unwrap();
    assert_eq!(store.list("nodes/").unwrap().len(), 10_000);
    assert_eq!(store.list("nodes/n3/").unwrap().len(), 1_000);
}
