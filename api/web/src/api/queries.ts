// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// What the page reads repeatedly, and how often. Keys are paths, so that an action can refresh what it touched.
import { QueryClient, useQuery, type UseQueryResult } from '@tanstack/react-query';
import { useMemo } from 'react';

import { ApiError, call, path } from './client';
import type {
  Guest,
  GuestConfig,
  GuestStatus,
  IndexedTemplate,
  NetworkInterface,
  NodeStatus,
  PendingRow,
  Realm,
  Resource,
  SeriesRow,
  Snapshot,
  StorageRow,
  Task,
  Volume,
} from './types';

/** How often each kind of state is read, in milliseconds. */
export const POLL_MS = { resources: 3000, guest: 2000, tasks: 2500, node: 5000, config: 10_000 };

export const queryClient = new QueryClient({
  defaultOptions: {
    queries: {
      retry: (count, error) => count < 2 && error instanceof ApiError && error.status === 0,
      staleTime: 1000,
      networkMode: 'always',
    },
    // A node on this machine answers also while the browser believes to be offline.
    mutations: { networkMode: 'always' },
  },
});

/** Reads again everything that an action may have changed. */
export function refresh(): Promise<void> {
  return queryClient.invalidateQueries();
}

function useGet<T>(target: string | null, options: { every?: number; parameters?: Record<string, string | number> } = {}): UseQueryResult<T> {
  return useQuery({
    queryKey: [target, options.parameters ?? {}],
    queryFn: ({ signal }) => call<T>('GET', target ?? '', options.parameters, signal),
    enabled: target !== null,
    refetchInterval: options.every ?? false,
  });
}

export function guestPath(guest: Pick<Guest, 'node' | 'type' | 'vmid'>): string {
  return path`/nodes/${guest.node}/${guest.type}/${guest.vmid}`;
}

export const useResources = () => useGet<Resource[]>('/cluster/resources', { every: POLL_MS.resources });
export const useTasks = () => useGet<Task[]>('/cluster/tasks', { every: POLL_MS.tasks });
export const useRealms = () => useGet<Realm[]>('/access/domains');
export const useVersion = () => useGet<{ version: string; atoll?: string }>('/version');
export const useDatacenterOptions = () => useGet<Record<string, unknown>>('/cluster/options');

export function isGuest(resource: Resource): resource is Guest {
  return resource.type === 'qemu' || resource.type === 'lxc';
}

export function useGuests(): Guest[] {
  const { data } = useResources();
  return useMemo(() => (data ?? []).filter(isGuest).sort((a, b) => a.vmid - b.vmid), [data]);
}

export function useNodes(): Resource[] {
  const { data } = useResources();
  return useMemo(() => (data ?? []).filter((row) => row.type === 'node').sort((a, b) => (a.node ?? '').localeCompare(b.node ?? '')), [data]);
}

export const useNodeStatus = (node: string) => useGet<NodeStatus>(path`/nodes/${node}/status`, { every: POLL_MS.node });
export const useNodeTasks = (node: string, filter: { vmid?: number } = {}) =>
  useGet<Task[]>(path`/nodes/${node}/tasks`, { every: POLL_MS.tasks, parameters: { limit: 200, source: 'all', ...filter } });
export const useNodeNetwork = (node: string | null) => useGet<NetworkInterface[]>(node && path`/nodes/${node}/network`);
export const useNodeStorages = (node: string | null) => useGet<StorageRow[]>(node && path`/nodes/${node}/storage`);

export const useVolumes = (node: string | null, storage: string | null, content?: string) =>
  useGet<Volume[]>(node && storage ? path`/nodes/${node}/storage/${storage}/content` : null, {
    every: POLL_MS.config,
    ...(content ? { parameters: { content } } : {}),
  });

export const useTemplates = (node: string) => useGet<IndexedTemplate[]>(path`/nodes/${node}/aplinfo`, { every: POLL_MS.config });

export const useGuestStatus = (guest: Guest) => useGet<GuestStatus>(`${guestPath(guest)}/status/current`, { every: POLL_MS.guest });
export const useGuestConfig = (guest: Guest) => useGet<GuestConfig>(`${guestPath(guest)}/config`, { every: POLL_MS.config });
export const useGuestPending = (guest: Guest) => useGet<PendingRow[]>(`${guestPath(guest)}/pending`, { every: POLL_MS.config });

export const useSnapshots = (guest: Guest) => useGet<Snapshot[]>(`${guestPath(guest)}/snapshot`, { every: POLL_MS.config });

export type Timeframe = 'hour' | 'day' | 'week' | 'month' | 'year';

/** History of a node or guest; `base` is its path. */
export const useHistory = (base: string, timeframe: Timeframe) =>
  useGet<SeriesRow[]>(`${base}/rrddata`, { every: timeframe === 'hour' ? 15_000 : 120_000, parameters: { timeframe, cf: 'AVERAGE' } });
