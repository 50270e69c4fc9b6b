// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The volumes of a storage: list, upload, download from an address, pull from a registry, delete.
import { ActionIcon, Button, Group, Select, Stack, Text, TextInput, Tooltip } from '@mantine/core';
import { IconBooks, IconDownload, IconPackageImport, IconTrash, IconUpload } from '@tabler/icons-react';
import { DataTable } from 'mantine-datatable';
import { useMemo, useState } from 'react';

import { call, path } from '../api/client';
import { useVolumes } from '../api/queries';
import type { Volume } from '../api/types';
import { ActionDialog } from '../app/ActionDialog';
import { ErrorNote } from '../app/ErrorPage';
import { bytes, time } from '../lib/format';
import { DownloadDialog } from './DownloadDialog';
import { PullDialog } from './PullDialog';
import { TemplateDialog } from './TemplateDialog';
import { UploadDialog } from './UploadDialog';

export const CONTENT_NAMES: Record<string, string> = {
  images: 'VM disks',
  rootdir: 'Container disks',
  vztmpl: 'Container templates',
  iso: 'ISO images',
  snippets: 'Snippets',
  backup: 'Backups',
  import: 'Images to import',
};

/** Content that can be sent from here. */
const SENDABLE = ['vztmpl', 'iso', 'snippets', 'import'];

interface ContentProps {
  node: string;
  storage: string;
  contents: string[];
}

function DeleteDialog({ node, storage, volume, onClose }: { node: string; storage: string; volume: Volume; onClose: () => void }) {
  const remove = () => call<string | null>('DELETE', path`/nodes/${node}/storage/${storage}/content/${volume.volid}`);
  return (
    <ActionDialog title="Delete volume" verb="Delete" act={remove} onClose={onClose} isDangerous isQuestion>
      {() => (
        <Text size="sm">
          <b className="atoll-mono">{volume.volid}</b> ({bytes(volume.size)}) is removed for good.
          {volume.vmid ? ` It belongs to guest ${volume.vmid}.` : ''}
        </Text>
      )}
    </ActionDialog>
  );
}

function useFiltered(volumes: Volume[] | undefined, kind: string | null, text: string): Volume[] {
  return useMemo(
    () =>
      (volumes ?? [])
        .filter((volume) => (!kind || volume.content === kind) && volume.volid.toLowerCase().includes(text.toLowerCase()))
        .sort((a, b) => a.content.localeCompare(b.content) || a.volid.localeCompare(b.volid)),
    [volumes, kind, text],
  );
}

export function ContentTab({ node, storage, contents }: ContentProps) {
  const volumes = useVolumes(node, storage);
  const [kind, setKind] = useState<string | null>(null);
  const [text, setText] = useState('');
  const [dialog, setDialog] = useState<'upload' | 'download' | 'pull' | 'template' | null>(null);
  const [doomed, setDoomed] = useState<Volume | null>(null);
  const shown = useFiltered(volumes.data, kind, text);
  const sendable = contents.filter((name) => SENDABLE.includes(name));
  return (
    <Stack gap="sm">
      <Group justify="space-between">
        <Group gap="xs">
          <TextInput size="xs" aria-label="Filter by name" placeholder="Filter by name" value={text} onChange={(event) => setText(event.currentTarget.value)} />
          <Select size="xs" aria-label="Kind of content" placeholder="All content" clearable value={kind} onChange={setKind} data={contents.map((name) => ({ value: name, label: CONTENT_NAMES[name] ?? name }))} />
        </Group>
        <Group gap={6}>
          <Button variant="default" leftSection={<IconUpload size={14} aria-hidden />} disabled={sendable.length === 0} onClick={() => setDialog('upload')}>
            Upload
          </Button>
          <Button variant="default" leftSection={<IconDownload size={14} aria-hidden />} disabled={sendable.length === 0} onClick={() => setDialog('download')}>
            Download from URL
          </Button>
          <Button variant="default" leftSection={<IconPackageImport size={14} aria-hidden />} disabled={!contents.includes('vztmpl')} onClick={() => setDialog('pull')}>
            Pull an image
          </Button>
          <Button variant="default" leftSection={<IconBooks size={14} aria-hidden />} disabled={!contents.includes('vztmpl')} onClick={() => setDialog('template')}>
            Templates
          </Button>
        </Group>
      </Group>
      <ErrorNote error={volumes.error} title="The content cannot be read" />
      <DataTable
        withTableBorder
        idAccessor="volid"
        records={shown}
        fetching={volumes.isLoading}
        minHeight={shown.length ? 0 : 120}
        noRecordsText="Nothing here"
        verticalSpacing={3}
        fz="sm"
        columns={[
          { accessor: 'volid', title: 'Volume', ellipsis: true, render: (volume) => <span className="atoll-mono">{volume.volid}</span> },
          { accessor: 'content', title: 'Content', width: 160, render: (volume) => CONTENT_NAMES[volume.content] ?? volume.content },
          { accessor: 'format', title: 'Format', width: 80 },
          { accessor: 'vmid', title: 'Guest', width: 80, render: (volume) => volume.vmid ?? '–' },
          { accessor: 'size', title: 'Size', width: 110, textAlign: 'right', render: (volume) => bytes(volume.size) },
          { accessor: 'ctime', title: 'Created', width: 150, render: (volume) => time(volume.ctime) },
          {
            accessor: 'actions',
            title: <span className="atoll-hidden">Actions</span>,
            width: 50,
            render: (volume) => (
              <Tooltip label="Delete">
                <ActionIcon variant="subtle" color="red" size="sm" aria-label={`Delete ${volume.volid}`} disabled={Boolean(volume.protected)} onClick={() => setDoomed(volume)}>
                  <IconTrash size={15} />
                </ActionIcon>
              </Tooltip>
            ),
          },
        ]}
      />
      {dialog === 'upload' && <UploadDialog node={node} storage={storage} contents={sendable} onClose={() => setDialog(null)} />}
      {dialog === 'download' && <DownloadDialog node={node} storage={storage} contents={sendable} onClose={() => setDialog(null)} />}
      {dialog === 'pull' && <PullDialog node={node} storage={storage} onClose={() => setDialog(null)} />}
      {dialog === 'template' && <TemplateDialog node={node} storage={storage} onClose={() => setDialog(null)} />}
      {doomed && <DeleteDialog node={node} storage={storage} volume={doomed} onClose={() => setDoomed(null)} />}
    </Stack>
  );
}
