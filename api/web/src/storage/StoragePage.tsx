// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The page of one storage of one node: how full it is, and what is in it.
import { SimpleGrid, Stack } from '@mantine/core';
import { IconDatabase } from '@tabler/icons-react';
import { useParams } from '@tanstack/react-router';

import { path } from '../api/client';
import { useNodeStorages } from '../api/queries';
import type { StorageRow } from '../api/types';
import { ErrorNote } from '../app/ErrorPage';
import { bytes, fraction } from '../lib/format';
import { Meter } from '../ui/Meter';
import { Page } from '../ui/Page';
import { Facts, Panel } from '../ui/Panel';
import { StatusBadge } from '../ui/Status';
import { CONTENT_NAMES, ContentTab } from './ContentTab';

function contents(storage: StorageRow | undefined): string[] {
  return storage?.content.split(',').filter(Boolean) ?? [];
}

function Summary({ storage }: { storage: StorageRow | undefined }) {
  return (
    <SimpleGrid cols={{ base: 1, lg: 2 }} spacing="sm">
      <Panel title="Storage">
        <Facts
          rows={[
            ['Type', storage?.type],
            ['State', <StatusBadge key="s" status={storage?.active ? 'available' : 'offline'} />],
            ['Shared', storage?.shared ? 'yes' : 'no'],
            ['Content', contents(storage).map((name) => CONTENT_NAMES[name] ?? name).join(', ')],
          ]}
        />
      </Panel>
      <Panel title="Use">
        <Stack gap="sm">
          <Meter label="Space" fraction={fraction(storage?.used, storage?.total)} detail={bytes(storage?.total)} />
          <Facts rows={[['Used', bytes(storage?.used)], ['Free', bytes(storage?.avail)]]} />
        </Stack>
      </Panel>
    </SimpleGrid>
  );
}

export function StoragePage() {
  const { node, storage, tab } = useParams({ strict: false }) as { node: string; storage: string; tab?: string };
  const storages = useNodeStorages(node);
  const row = storages.data?.find((other) => other.storage === storage);
  return (
    <Page
      key={`${node}/${storage}`}
      title={`Storage ${storage} on ${node}`}
      icon={<IconDatabase size={20} stroke={1.7} aria-hidden />}
      base={path`/nodes/${node}/storage/${storage}`}
      tab={tab}
      tabs={[
        { value: 'content', label: 'Content', content: <ContentTab node={node} storage={storage} contents={contents(row)} /> },
        { value: 'summary', label: 'Summary', content: storages.isError ? <ErrorNote error={storages.error} /> : <Summary storage={row} /> },
      ]}
    />
  );
}
