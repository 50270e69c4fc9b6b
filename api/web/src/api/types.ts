// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// What the API answers, as far as the page reads it. Names are the API's.

export type GuestType = 'qemu' | 'lxc';

/** A row of GET /cluster/resources. */
export interface Resource {
  id: string;
  type: GuestType | 'node' | 'storage' | 'pool' | 'sdn' | 'network';
  node?: string;
  status?: string;
  name?: string;
  vmid?: number;
  storage?: string;
  plugintype?: string;
  content?: string;
  shared?: number;
  cpu?: number;
  maxcpu?: number;
  mem?: number;
  maxmem?: number;
  disk?: number;
  maxdisk?: number;
  uptime?: number;
  template?: number;
  lock?: string;
  tags?: string;
}

/** A guest among the resources. */
export interface Guest extends Resource {
  type: GuestType;
  vmid: number;
  node: string;
}

/** GET …/status/current. Traffic and disk counters are totals in bytes since the start. */
export interface GuestStatus {
  vmid: number;
  name?: string;
  status: string;
  qmpstatus?: string;
  lock?: string;
  cpu?: number;
  cpus?: number;
  mem?: number;
  maxmem?: number;
  swap?: number;
  maxswap?: number;
  disk?: number;
  maxdisk?: number;
  diskread?: number;
  diskwrite?: number;
  netin?: number;
  netout?: number;
  uptime?: number;
  pid?: number;
  /** Atoll's own: what a container's health command has found, while it runs. */
  health?: 'starting' | 'healthy' | 'unhealthy';
  'health-failures'?: number;
  'health-message'?: string;
}

interface Usage {
  used: number;
  total: number;
  free?: number;
  avail?: number;
}

/** GET /nodes/N/status. */
export interface NodeStatus {
  cpu?: number;
  cpuinfo?: { model?: string; cpus?: number; sockets?: number; cores?: number };
  loadavg?: (string | number)[];
  memory?: Usage;
  rootfs?: Usage;
  swap?: Usage;
  uptime?: number;
  pveversion?: string;
  kversion?: string;
  'current-kernel'?: { release?: string; machine?: string };
}

/** A row of …/rrddata; series that were not measured are absent. Rates are bytes a second. */
export type SeriesRow = { time: number } & Record<string, number | undefined>;

/** A row of GET /nodes/N/aplinfo: a container template of a signed index. */
export interface IndexedTemplate {
  template: string;
  package: string;
  version: string;
  section: string;
  headline: string;
  description: string;
}

export interface Task {
  upid: string;
  node: string;
  type: string;
  id?: string;
  user: string;
  starttime: number;
  endtime?: number;
  status?: string;
}

export interface TaskStatus extends Omit<Task, 'status' | 'endtime'> {
  status: 'running' | 'stopped';
  exitstatus?: string;
}

export interface StorageRow {
  storage: string;
  type: string;
  content: string;
  active?: number;
  enabled?: number;
  shared?: number;
  total?: number;
  used?: number;
  avail?: number;
}

export interface Volume {
  volid: string;
  content: string;
  format: string;
  size: number;
  used?: number;
  ctime?: number;
  vmid?: number;
  notes?: string;
  protected?: number;
}

export interface NetworkInterface {
  iface: string;
  type: string;
  active?: number;
  autostart?: number;
  cidr?: string;
  address?: string;
  gateway?: string;
  bridge_ports?: string;
  bridge_vlan_aware?: number;
  comments?: string;
}

/** A row of …/pending. */
export interface PendingRow {
  key: string;
  value?: string | number;
  pending?: string | number;
  delete?: number;
}

/** A row of …/snapshot; the last one is `current`, where the guest is now. */
export interface Snapshot {
  name: string;
  description?: string;
  snaptime?: number;
  parent?: string;
  snapstate?: string;
}

export type GuestConfig = Record<string, string | number> & { digest?: string };

export interface Realm {
  realm: string;
  type: string;
  comment?: string;
  default?: number;
}
