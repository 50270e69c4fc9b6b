// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Which config keys the two tabs show, and in which order. Pure.
import { freeKey, type Params } from '../api/schema';
import type { GuestConfig, PendingRow } from '../api/types';

/** Members of a family whose schema tells no count. */
const FAMILY_COUNT = 32;

export type Part = 'hardware' | 'options';

const HARDWARE =
  /^(memory|balloon|swap|cores|sockets|vcpus|cpu|cpulimit|cpuunits|bios|machine|scsihw|vga|watchdog|hugepages|kernel|initrd|cmdline|rootfs|rng0|efidisk0|tpmstate0|(net|scsi|virtio|sata|ide|mp|dev|serial|hostpci|usb|unused|virtiofs)(\d+|\[n\]))$/;
/** Parameters of the config call that are not config keys, and keys that are shown elsewhere. */
const NOT_KEYS = new Set(['node', 'vmid', 'digest', 'delete', 'revert', 'force', 'skiplock', 'background_delay', 'description', 'lock', 'meta', 'parent', 'snapshot', 'pending', 'current', 'lxc']);
const ORDER = ['name', 'hostname', 'cores', 'sockets', 'cpu', 'memory', 'balloon', 'swap', 'kernel', 'initrd', 'cmdline', 'rootfs'];

export function belongs(key: string, part: Part): boolean {
  return !NOT_KEYS.has(key) && HARDWARE.test(key) === (part === 'hardware');
}

/** One line of a config tab. */
export interface ConfigRow {
  key: string;
  /** In force now; absent when the key is not set. */
  value: string | undefined;
  /** Takes effect at the next start. */
  pending: string | undefined;
  /** Is removed at the next start. */
  deletes: boolean;
}

function rank(key: string): number {
  const at = ORDER.indexOf(key);
  return at < 0 ? ORDER.length : at;
}

/** Keys that a guest is thought of by: shown also when they are not set. */
const ALWAYS = new Set(['cores', 'memory', 'swap', 'kernel', 'initrd', 'cmdline']);

/** Lines of a tab: everything that is set or pending; of what could be set, all options but only the main hardware. */
export function configRows(part: Part, config: GuestConfig, pending: PendingRow[], params: Params): ConfigRow[] {
  const rows = new Map<string, ConfigRow>();
  const useful = (key: string) => params[key]?.effect === undefined;
  const single = Object.keys(params).filter((key) => !key.includes('[n]') && useful(key) && (part === 'options' || ALWAYS.has(key)));
  for (const key of [...Object.keys(config), ...single]) {
    if (!belongs(key, part) || rows.has(key)) continue;
    const value = config[key];
    rows.set(key, { key, value: value === undefined ? undefined : String(value), pending: undefined, deletes: false });
  }
  for (const entry of pending) {
    if (!belongs(entry.key, part) || (entry.pending === undefined && !entry.delete)) continue;
    rows.set(entry.key, {
      key: entry.key,
      value: entry.value === undefined ? undefined : String(entry.value),
      pending: entry.pending === undefined ? undefined : String(entry.pending),
      deletes: Boolean(entry.delete),
    });
  }
  const order = (a: ConfigRow, b: ConfigRow) => rank(a.key) - rank(b.key) || a.key.localeCompare(b.key, undefined, { numeric: true });
  return [...rows.values()].sort(order);
}

/** Keys that can be added in a tab: the next free member of each family (net1, virtio0, …), and what no row shows. */
export function addable(part: Part, params: Params, shown: string[]): string[] {
  const keys = Object.entries(params)
    .filter(([key, param]) => belongs(key, part) && !key.startsWith('unused') && param.effect === undefined)
    .map(([key, param]) => (key.includes('[n]') ? freeKey(key, param.count ?? FAMILY_COUNT, shown) : shown.includes(key) ? null : key));
  return keys.filter((key) => key !== null);
}

/** A disk whose size can grow. */
export function isVolume(key: string): boolean {
  return /^(rootfs|(mp|scsi|virtio)\d+)$/.test(key);
}

/** A key that holds CD-ROM drives only. */
export function isDrive(key: string): boolean {
  return /^(ide|sata)\d+$/.test(key);
}

/** What a guest can boot from. */
export function isBootable(key: string): boolean {
  return /^(scsi|virtio|ide|sata|net)\d+$/.test(key);
}
