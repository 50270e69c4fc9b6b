// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// What exists on a node to choose from: storages, volumes, bridges. One hook, so that forms can be tables.
import { useQueries, useQuery } from '@tanstack/react-query';
import { useMemo } from 'react';

import { call, path } from '../api/client';
import { useNodeNetwork, useNodes, useNodeStorages } from '../api/queries';
import type { StorageRow, Volume } from '../api/types';
import { bytes } from '../lib/format';
import type { Choice } from './Field';

/** Where a field's choices come from. */
export type Source = 'nodes' | 'bridges' | 'cpus' | `storages/${string}` | `volumes/${string}`;

const BRIDGE_TYPES = new Set(['bridge', 'OVSBridge', 'vnet']);

function holds(storage: StorageRow, content: string): boolean {
  return storage.enabled !== 0 && storage.active !== 0 && storage.content.split(',').includes(content);
}

function useVolumeChoices(node: string | null, storages: StorageRow[] | undefined, contents: string[]) {
  const wanted = contents.flatMap((content) => (storages ?? []).filter((storage) => holds(storage, content)).map((storage) => ({ content, storage: storage.storage })));
  return useQueries({
    queries: wanted.map(({ content, storage }) => {
      const target = path`/nodes/${node ?? ''}/storage/${storage}/content`;
      return { queryKey: [target, { content }], queryFn: () => call<Volume[]>('GET', target, { content }), enabled: node !== null };
    }),
    combine: (results) => results.flatMap((result) => result.data ?? []),
  });
}

/** What the API calls a drive without a disc. */
const NO_DISC: Choice = { value: 'none', label: 'No disc' };

function storageChoice(storage: StorageRow): Choice {
  return { value: storage.storage, label: storage.avail === undefined ? storage.storage : `${storage.storage} – ${bytes(storage.avail, 1)} free` };
}

/** Choices for each source, on one node. */
export function useChoices(node: string | null, sources: Source[]): Map<Source, Choice[]> {
  const nodes = useNodes();
  const storages = useNodeStorages(node);
  const network = useNodeNetwork(node);
  const cpus = useQuery({
    queryKey: ['cpus', node],
    queryFn: () => call<{ name: string; description?: string }[]>('GET', path`/nodes/${node ?? ''}/capabilities/qemu/cpu`),
    enabled: node !== null && sources.includes('cpus'),
    staleTime: Infinity,
  });
  const contents = sources.filter((source) => source.startsWith('volumes/')).map((source) => source.slice('volumes/'.length));
  const volumes = useVolumeChoices(node, storages.data, contents);
  return useMemo(() => {
    const found = new Map<Source, Choice[]>();
    for (const source of sources) {
      const [kind, content = ''] = source.split('/');
      if (kind === 'nodes') found.set(source, nodes.map((row) => ({ value: row.node ?? '', label: `${row.node}${row.status === 'online' ? '' : ` (${row.status})`}` })));
      if (kind === 'bridges') found.set(source, (network.data ?? []).filter((row) => BRIDGE_TYPES.has(row.type)).map((row) => ({ value: row.iface, label: row.comments ? `${row.iface} – ${row.comments.trim()}` : row.iface })));
      if (kind === 'cpus') found.set(source, (cpus.data ?? []).map((model) => ({ value: model.name, label: model.description ? `${model.name} – ${model.description}` : model.name })));
      if (kind === 'storages') found.set(source, (storages.data ?? []).filter((storage) => holds(storage, content)).map(storageChoice));
      if (kind === 'volumes') found.set(source, [...(content === 'iso' ? [NO_DISC] : []), ...volumes.filter((volume) => volume.content === content).map((volume) => ({ value: volume.volid, label: volume.volid }))]);
    }
    return found;
  }, [sources, nodes, storages.data, network.data, volumes, cpus.data]);
}
