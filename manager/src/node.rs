// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The handle on one node: opens everything in order, and hands out the parts.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::access::Access;
use crate::cluster::Cluster;
use crate::error::Error;
use crate::guest::Guests;
use crate::guest::container::dhcp::keep::Keep;
use crate::guest::container::health::Healths;
use crate::guest::container::watch::Watch;
use crate::guest::lock::Locks;
use crate::guest::site::Site;
use crate::guest::strays;
use crate::id::InvalidId;
use crate::metrics::Metrics;
use crate::network::Network;
use crate::oci::Images;
use crate::reconcile::Reconciler;
use crate::sampler::Sampler;
use crate::settings::Settings;
use crate::storage::Storages;
use crate::store::{ConfigStore, RedbStore};
use crate::task::Tasks;
use crate::templates::Templates;

/// A node, opened; cheap to clone. The parts keep what they share in here.
#[derive(Debug, Clone)]
pub struct Node {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    settings: Settings,
    store: Arc<dyn ConfigStore>,
    tasks: Tasks,
    access: Access,
    cluster: Cluster,
    metrics: Metrics,
    storage: Storages,
    templates: Templates,
    network: Network,
    guests: Guests,
}

impl Node {
    /// Opens the state directory (made if missing) with the embedded store.
    pub async fn open(settings: Settings) -> Result<Self, Error> {
        let path = settings.store_path();
        let state = settings.state.clone();
        let store = tokio::task::spawn_blocking(move || {
            std::fs::create_dir_all(&state)
                .map_err(|e| Error::failed(format!("create {}", state.display()), e))?;
            RedbStore::open(&path).map_err(|e| Error::failed(format!("open {}", path.display()), e))
        })
        .await
        .map_err(|e| Error::failed("open the store", e))??;
        Self::with_store(settings, Arc::new(store)).await
    }

    /// The same on a store of the caller's choice; tests use the one in memory.
    pub async fn with_store(
        settings: Settings,
        store: Arc<dyn ConfigStore>,
    ) -> Result<Self, Error> {
        crate::id::check_node_name(&settings.node)
            .map_err(|e| Error::invalid("node", e.to_string()))?;
        let tasks = Tasks::open(&settings.node, &settings.tasks_dir(), settings.workers_max)?;
        let access = Access::new(store.clone());
        let cluster = Cluster::new(store.clone());
        let metrics = Metrics::open(&settings.metrics_dir())?;
        let storage = Storages::new(store.clone(), &settings.node);
        let templates = Templates::open(settings.templates_dir())?;
        let network = Network {
            bridge: settings.bridge.clone(),
            address: settings
                .bridge_address
                .parse()
                .map_err(|e: InvalidId| Error::invalid("bridge-address", e.to_string()))?,
            folder: settings.run_dir(),
        };
        let site = Site {
            settings: settings.clone(),
            store: store.clone(),
            storage: storage.clone(),
            images: Images::new(settings.images_dir()),
            health: Healths::default(),
            locks: Locks::default(),
            agents: Locks::default(),
        };
        let guests = Guests::new(Arc::new(site), tasks.clone(), cluster.clone());
        Ok(Self {
            shared: Arc::new(Shared {
                settings,
                store,
                tasks,
                access,
                cluster,
                metrics,
                storage,
                templates,
                network,
                guests,
            }),
        })
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.shared.settings.node
    }

    /// What it was started with.
    pub fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// The configuration of the whole cluster.
    pub fn store(&self) -> &Arc<dyn ConfigStore> {
        &self.shared.store
    }

    /// Users and their rights.
    pub fn access(&self) -> &Access {
        &self.shared.access
    }

    /// What concerns all nodes: options, numbers of guests, the inventory.
    pub fn cluster(&self) -> &Cluster {
        &self.shared.cluster
    }

    /// Time series.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Places for volumes.
    pub fn storage(&self) -> &Storages {
        &self.shared.storage
    }

    /// Indexes of container templates.
    pub fn templates(&self) -> &Templates {
        &self.shared.templates
    }

    /// Keeps the node in order until `stop`: storage `local`, the guests' network, guests that end or were left by a
    /// former daemon; and records its load. Guests run on when it returns.
    pub async fn run(&self, stop: CancellationToken) -> Result<(), Error> {
        let shared = &self.shared;
        shared
            .storage
            .ensure_local(&shared.settings.storage_dir())
            .await?;
        let reconciler = Reconciler::new(shared.guests.clone(), shared.network.clone());
        let sampler = Sampler::new(
            &shared.settings.node,
            shared.guests.clone(),
            shared.storage.clone(),
            shared.cluster.clone(),
            shared.metrics.clone(),
        );
        let watch = Watch::new(shared.guests.clone());
        let keep = Keep::new(shared.guests.clone());
        tokio::join!(
            keep.run(stop.clone()),
            reconciler.run(stop.clone()),
            watch.run(stop.clone()),
            strays::run(shared.guests.site().clone(), stop.clone()),
            sampler.run(stop)
        );
        Ok(())
    }

    /// Leaves the host as it was found, as far as no guest needs the node's network any more. Called when the daemon
    /// ends in good order; guests that run keep their bridge.
    pub async fn leave(&self) -> Result<(), Error> {
        if self.guests().any_running()? {
            return Ok(());
        }
        self.network().teardown().await
    }

    /// Virtual machines and containers.
    pub fn guests(&self) -> &Guests {
        &self.shared.guests
    }

    /// The bridge with its NAT and DHCP.
    pub fn network(&self) -> &Network {
        &self.shared.network
    }

    /// Tasks of this node.
    pub fn tasks(&self) -> &Tasks {
        &self.shared.tasks
    }
}
