// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The tree of datacenter, nodes, guests and storages as a flat list of visible rows. Pure: no React, no requests.
import type { Resource } from '../api/types';
import { resourceLink } from '../lib/guest';

/** One visible line of the tree. */
export interface Row {
  id: string;
  kind: 'datacenter' | 'node' | 'qemu' | 'lxc' | 'storage';
  label: string;
  level: number;
  parent: string | null;
  link: string;
  status: string | undefined;
  lock: string | undefined;
  /** Absent for rows that can have nothing below them. */
  expanded?: boolean;
}

const ORDER = { qemu: 0, lxc: 0, storage: 1 } as const;

function label(resource: Resource): string {
  if (resource.vmid !== undefined) return `${resource.vmid} ${resource.name ?? ''}`.trim();
  return resource.storage ?? resource.node ?? resource.id;
}

function matches(resource: Resource, words: string[]): boolean {
  const text = [resource.vmid, resource.name, resource.node, resource.storage, resource.status, resource.tags, resource.type === 'qemu' ? 'vm' : resource.type === 'lxc' ? 'ct container' : resource.type]
    .filter((part) => part !== undefined)
    .join(' ')
    .toLowerCase();
  return words.every((word) => text.includes(word));
}

function compare(a: Resource, b: Resource): number {
  const byKind = ORDER[a.type as keyof typeof ORDER] - ORDER[b.type as keyof typeof ORDER];
  return byKind || (a.vmid ?? 0) - (b.vmid ?? 0) || label(a).localeCompare(label(b));
}

function leaf(resource: Resource): Row {
  return {
    id: resource.id,
    kind: resource.type as Row['kind'],
    label: label(resource),
    level: 3,
    parent: `node/${resource.node}`,
    link: resourceLink(resource),
    status: resource.status,
    lock: resource.lock,
  };
}

/** Rows to show. A filter opens everything and keeps what matches all its words, and the nodes above it. */
export function rows(resources: Resource[], filter: string, collapsed: ReadonlySet<string>): Row[] {
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  const below = new Map<string, Resource[]>();
  const nodes = resources.filter((row) => row.type === 'node').sort((a, b) => (a.node ?? '').localeCompare(b.node ?? ''));
  for (const resource of resources) {
    if (!(resource.type in ORDER) || (words.length > 0 && !matches(resource, words))) continue;
    const group = below.get(resource.node ?? '');
    if (group) group.push(resource);
    else below.set(resource.node ?? '', [resource]);
  }
  const rootOpen = words.length > 0 || !collapsed.has('datacenter');
  const built: Row[] = [{ id: 'datacenter', kind: 'datacenter', label: 'Datacenter', level: 1, parent: null, link: '/', status: undefined, lock: undefined, expanded: rootOpen }];
  if (!rootOpen) return built;
  for (const node of nodes) {
    const children = below.get(node.node ?? '') ?? [];
    if (words.length > 0 && children.length === 0 && !matches(node, words)) continue;
    const expanded = words.length > 0 || !collapsed.has(node.id);
    built.push({ id: node.id, kind: 'node', label: label(node), level: 2, parent: 'datacenter', link: resourceLink(node), status: node.status, lock: undefined, expanded });
    if (expanded) built.push(...children.sort(compare).map(leaf));
  }
  return built;
}

/** What a key does in the tree. */
export type Move = { to: number } | { toggle: string } | { open: number } | null;

/** The answer to a key at a row: the keys of the ARIA tree pattern. */
export function keyMove(key: string, list: Row[], at: number): Move {
  const row = list[at];
  if (!row) return null;
  switch (key) {
    case 'ArrowDown':
      return { to: Math.min(at + 1, list.length - 1) };
    case 'ArrowUp':
      return { to: Math.max(at - 1, 0) };
    case 'Home':
      return { to: 0 };
    case 'End':
      return { to: list.length - 1 };
    case 'ArrowRight':
      return row.expanded === false ? { toggle: row.id } : { to: row.expanded ? Math.min(at + 1, list.length - 1) : at };
    case 'ArrowLeft':
      return row.expanded ? { toggle: row.id } : { to: Math.max(0, list.findIndex((other) => other.id === row.parent)) };
    case 'Enter':
    case ' ':
      return { open: at };
    default:
      return null;
  }
}
