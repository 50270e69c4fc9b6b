// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The page of one guest. Its address is the guest's number alone, so that it stays when the guest moves.
import { Skeleton, Text } from '@mantine/core';
import { IconBox, IconDeviceDesktop } from '@tabler/icons-react';
import { useParams } from '@tanstack/react-router';
import { lazy, Suspense } from 'react';

import { isGuest, useNodeTasks, useResources } from '../api/queries';
import type { Guest } from '../api/types';
import { ErrorNote } from '../app/ErrorPage';
import { guestTitle, KIND } from '../lib/guest';
import { TaskTable } from '../tasks/TaskTable';
import { Page } from '../ui/Page';
import { StatusBadge } from '../ui/Status';
import { ConfigTab } from './ConfigTab';
import { GuestActions } from './GuestActions';
import { GuestSummary } from './GuestSummary';
import { SnapshotsTab } from './SnapshotsTab';

const Console = lazy(() => import('../terminal/Console').then((module) => ({ default: module.Console })));

/** The guest with a number, once the list has been read. */
export function useGuest(vmid: string | undefined): { guest: Guest | undefined; loaded: boolean; error: unknown } {
  const { data, error } = useResources();
  const guest = data?.find((row): row is Guest => isGuest(row) && String(row.vmid) === vmid);
  return { guest, loaded: data !== undefined, error };
}

function GuestTasks({ guest }: { guest: Guest }) {
  const tasks = useNodeTasks(guest.node, { vmid: guest.vmid });
  return tasks.isError ? <ErrorNote error={tasks.error} /> : <TaskTable tasks={tasks.data} />;
}

export function GuestPage() {
  const { vmid, tab } = useParams({ strict: false }) as { vmid: string; tab?: string };
  const { guest, loaded, error } = useGuest(vmid);
  if (!guest) {
    if (error) return <ErrorNote error={error} />;
    return loaded ? <Text p="lg">There is no guest {vmid}; it may have been deleted.</Text> : <Skeleton h={200} m="lg" />;
  }
  const Icon = guest.type === 'qemu' ? IconDeviceDesktop : IconBox;
  return (
    <Page
      key={guest.id}
      title={`${KIND[guest.type]} ${guestTitle(guest)}`}
      icon={<Icon size={20} stroke={1.7} aria-hidden />}
      badge={<StatusBadge status={guest.status} lock={guest.lock} />}
      actions={<GuestActions guest={guest} />}
      base={`/guests/${guest.vmid}`}
      tab={tab}
      tabs={[
        { value: 'summary', label: 'Summary', content: <GuestSummary guest={guest} /> },
        {
          value: 'console',
          label: 'Console',
          content: (
            <Suspense fallback={<Skeleton h={300} />}>
              <Console guest={guest} />
            </Suspense>
          ),
        },
        { value: 'hardware', label: guest.type === 'qemu' ? 'Hardware' : 'Resources', content: <ConfigTab guest={guest} part="hardware" /> },
        { value: 'options', label: 'Options', content: <ConfigTab guest={guest} part="options" /> },
        { value: 'snapshots', label: 'Snapshots', content: <SnapshotsTab guest={guest} /> },
        { value: 'tasks', label: 'Tasks', content: <GuestTasks guest={guest} /> },
      ]}
    />
  );
}
