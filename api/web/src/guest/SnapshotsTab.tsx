// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The snapshots of a guest: taken, gone back to, removed.
import { ActionIcon, Button, Checkbox, Group, Stack, Text, Textarea, TextInput, Tooltip } from '@mantine/core';
import { IconArrowBackUp, IconCamera, IconTrash } from '@tabler/icons-react';
import { DataTable } from 'mantine-datatable';
import { useState, useSyncExternalStore } from 'react';

import { call, path } from '../api/client';
import { guestPath, useSnapshots } from '../api/queries';
import { session } from '../api/session';
import type { Guest, Snapshot } from '../api/types';
import { ActionDialog } from '../app/ActionDialog';
import { ErrorNote } from '../app/ErrorPage';
import { guestTitle } from '../lib/guest';
import { time } from '../lib/format';
import { may } from './actions';

const NAME = /^[A-Za-z][A-Za-z0-9_-]{1,39}$/;

function TakeDialog({ guest, onClose }: { guest: Guest; onClose: () => void }) {
  const [name, setName] = useState('');
  const [description, setDescription] = useState('');
  const [memory, setMemory] = useState(false);
  const keepsMemory = memory && guest.type === 'qemu';
  const parameters = { snapname: name, ...(description ? { description } : {}), ...(keepsMemory ? { vmstate: true } : {}) };
  const take = () => call<string>('POST', `${guestPath(guest)}/snapshot`, parameters);
  const valid = NAME.test(name);
  return (
    <ActionDialog title={`Take a snapshot of ${guestTitle(guest)}`} verb="Take snapshot" act={take} onClose={onClose} valid={valid} size="md">
      {() => (
        <>
          {guest.status === 'running' && <Text size="sm">The guest stands still while its disks are copied{keepsMemory && ' and its memory is written'}.</Text>}
          <TextInput
            label="Name"
            data-autofocus
            autoComplete="off"
            value={name}
            onChange={(event) => setName(event.currentTarget.value)}
            error={name && !valid ? 'A letter first, then letters, digits, - and _; 2 to 40 in all.' : undefined}
          />
          {guest.status === 'running' && guest.type === 'qemu' && (
            <Checkbox
              label="Keep the memory, too"
              description="Going back goes on from this moment. Without it the guest starts anew."
              checked={memory}
              onChange={(event) => setMemory(event.currentTarget.checked)}
            />
          )}
          <Textarea label="Notes" autosize minRows={2} value={description} onChange={(event) => setDescription(event.currentTarget.value)} />
        </>
      )}
    </ActionDialog>
  );
}

type What = 'rollback' | 'delete';

const WORDS = {
  rollback: { title: 'Roll back', text: 'The guest becomes what it was then: stopped, or going on from there when the snapshot has its memory. What it has done since is lost.' },
  delete: { title: 'Delete', text: 'The snapshot is removed. The guest stays as it is.' },
} as const;

function ConfirmDialog({ guest, name, what, onClose }: { guest: Guest; name: string; what: What; onClose: () => void }) {
  const target = `${guestPath(guest)}${path`/snapshot/${name}`}`;
  const act = () => (what === 'rollback' ? call<string>('POST', `${target}/rollback`) : call<string>('DELETE', target));
  return (
    <ActionDialog title={`${WORDS[what].title}: ${name}`} verb={WORDS[what].title} act={act} onClose={onClose} isDangerous isQuestion>
      {() => <Text size="sm">{WORDS[what].text}</Text>}
    </ActionDialog>
  );
}

export function SnapshotsTab({ guest }: { guest: Guest }) {
  const snapshots = useSnapshots(guest);
  const user = useSyncExternalStore(session.subscribe, session.snapshot);
  const [taking, setTaking] = useState(false);
  const [asked, setAsked] = useState<{ name: string; what: What } | null>(null);
  const allowed = may(user, 'VM.Snapshot');
  const rows = (snapshots.data ?? []).filter((row) => row.name !== 'current');
  const present = snapshots.data?.find((row) => row.name === 'current')?.parent;
  const button = (row: Snapshot, what: What, Icon: typeof IconTrash) => (
    <Tooltip label={WORDS[what].title}>
      <ActionIcon variant="subtle" color={what === 'delete' ? 'red' : 'gray'} size="sm" aria-label={`${WORDS[what].title}: ${row.name}`} disabled={!allowed} onClick={() => setAsked({ name: row.name, what })}>
        <Icon size={15} />
      </ActionIcon>
    </Tooltip>
  );
  return (
    <Stack gap="sm">
      <ErrorNote error={snapshots.error} title="The snapshots cannot be read" />
      <Group>
        <Button variant="default" leftSection={<IconCamera size={14} aria-hidden />} disabled={!allowed} onClick={() => setTaking(true)}>
          Take snapshot
        </Button>
      </Group>
      <DataTable
        withTableBorder
        idAccessor="name"
        records={rows}
        fetching={snapshots.isLoading}
        minHeight={rows.length ? 0 : 100}
        noRecordsText="No snapshots yet"
        verticalSpacing={4}
        fz="sm"
        columns={[
          { accessor: 'name', title: 'Name', width: 220 },
          { accessor: 'snaptime', title: 'Taken', width: 160, render: (row) => (row.snapstate ? 'not complete' : time(row.snaptime)) },
          { accessor: 'parent', title: 'After', width: 160, render: (row) => row.parent ?? '–' },
          { accessor: 'description', title: 'Notes', render: (row) => <Text size="sm" style={{ whiteSpace: 'pre-wrap' }}>{`${row.name === present ? 'The guest is after this one. ' : ''}${row.description ?? ''}`.trim()}</Text> },
          {
            accessor: 'actions',
            title: <span className="atoll-hidden">Actions</span>,
            width: 90,
            render: (row) => (
              <Group gap={2} wrap="nowrap" justify="flex-end">
                {!row.snapstate && button(row, 'rollback', IconArrowBackUp)}
                {button(row, 'delete', IconTrash)}
              </Group>
            ),
          },
        ]}
      />
      {taking && <TakeDialog guest={guest} onClose={() => setTaking(false)} />}
      {asked && <ConfirmDialog guest={guest} name={asked.name} what={asked.what} onClose={() => setAsked(null)} />}
    </Stack>
  );
}
