// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The guest's configuration as a table: what is set, what waits for the next start, and what could be set.
import { ActionIcon, Button, Group, Menu, Stack, Text, Tooltip } from '@mantine/core';
import { notifications } from '@mantine/notifications';
import { IconArrowBackUp, IconArrowsMaximize, IconChevronDown, IconFolderSymlink, IconPencil, IconPlus, IconTrash } from '@tabler/icons-react';
import { useMutation } from '@tanstack/react-query';
import { DataTable } from 'mantine-datatable';
import { useMemo, useState } from 'react';

import { call, errorText } from '../api/client';
import { guestPath, refresh, useGuestConfig, useGuestPending } from '../api/queries';
import { canBeSet, paramOf, useCallSchema, type Params } from '../api/schema';
import type { Guest, GuestConfig } from '../api/types';
import { ErrorNote } from '../app/ErrorPage';
import { labelOf } from '../forms/labels';
import { BootDialog } from './BootDialog';
import { addable, configRows, isBootable, isVolume, type ConfigRow, type Part } from './keys';
import { KeyDialog } from './KeyDialog';
import { MoveDialog } from './MoveDialog';
import { ResizeDialog } from './ResizeDialog';

function isEditable(params: Params | undefined, key: string): boolean {
  const param = params && paramOf(params, key);
  return param !== undefined && canBeSet(param);
}

function Value({ row, params }: { row: ConfigRow; params: Params }) {
  const param = paramOf(params, row.key);
  const fallback = param?.default;
  return (
    <>
      {row.value === undefined ? (
        <Text size="sm" c="dimmed" span>
          {fallback === undefined ? 'not set' : `${fallback} (default)`}
        </Text>
      ) : (
        <span className="atoll-value">{row.value}</span>
      )}
      {row.value !== undefined && param?.effect === 'none' && (
        <Text size="sm" c="dimmed">
          Without effect: {param.why}
        </Text>
      )}
      {(row.pending !== undefined || row.deletes) && (
        <Text size="sm" className="atoll-warn">
          {row.deletes ? 'removed' : row.pending} at the next start
        </Text>
      )}
    </>
  );
}

interface RowActionsProps {
  guest: Guest;
  row: ConfigRow;
  params: Params;
  digest: string | undefined;
  onEdit: () => void;
  onResize: () => void;
  onMove: () => void;
}

function RowActions({ guest, row, params, digest, onEdit, onResize, onMove }: RowActionsProps) {
  const change = useMutation({
    mutationFn: (what: { delete: string } | { revert: string }) => call('PUT', `${guestPath(guest)}/config`, { ...what, digest }),
    onError: (error) => notifications.show({ color: 'red', title: labelOf(row.key), message: errorText(error), autoClose: false, closeButtonProps: { 'aria-label': 'Dismiss' } }),
    onSettled: refresh,
  });
  const editable = isEditable(params, row.key);
  const waits = row.pending !== undefined || row.deletes;
  const button = (label: string, Icon: typeof IconPencil, act: () => void, color = 'gray') => (
    <Tooltip label={label}>
      <ActionIcon variant="subtle" color={color} size="sm" aria-label={`${label}: ${labelOf(row.key)}`} onClick={act} disabled={change.isPending}>
        <Icon size={15} />
      </ActionIcon>
    </Tooltip>
  );
  return (
    <Group gap={2} wrap="nowrap" justify="flex-end">
      {waits && button('Revert', IconArrowBackUp, () => change.mutate({ revert: row.key }))}
      {row.value !== undefined && isVolume(row.key) && button('Resize', IconArrowsMaximize, onResize)}
      {row.value !== undefined && isVolume(row.key) && button('Move', IconFolderSymlink, onMove)}
      {editable && button('Edit', IconPencil, onEdit)}
      {editable && row.value !== undefined && row.key !== 'rootfs' && !row.deletes && button('Remove', IconTrash, () => change.mutate({ delete: row.key }), 'red')}
    </Group>
  );
}

function AddMenu({ keys, onAdd }: { keys: string[]; onAdd: (key: string) => void }) {
  return (
    <Menu position="bottom-start" withinPortal>
      <Menu.Target>
        <Button variant="default" leftSection={<IconPlus size={14} aria-hidden />} rightSection={<IconChevronDown size={13} aria-hidden />}>
          Add
        </Button>
      </Menu.Target>
      <Menu.Dropdown mah={400} style={{ overflowY: 'auto' }}>
        {keys.map((key) => (
          <Menu.Item key={key} onClick={() => onAdd(key)}>
            {labelOf(key)}
          </Menu.Item>
        ))}
      </Menu.Dropdown>
    </Menu>
  );
}

/** Keys of what the guest could boot from. */
function rowsOfDevices(config: GuestConfig): string[] {
  return Object.keys(config).filter(isBootable).sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
}

export function ConfigTab({ guest, part }: { guest: Guest; part: Part }) {
  const schema = useCallSchema('PUT', `/nodes/{node}/${guest.type}/{vmid}/config`);
  const config = useGuestConfig(guest);
  const pending = useGuestPending(guest);
  const [editing, setEditing] = useState<string | null>(null);
  const [resizing, setResizing] = useState<string | null>(null);
  const [moving, setMoving] = useState<string | null>(null);
  const params = schema.data?.parameters;
  const rows = useMemo(() => configRows(part, config.data ?? {}, pending.data ?? [], params ?? {}), [part, config.data, pending.data, params]);
  const more = useMemo(() => addable(part, params ?? {}, rows.map((row) => row.key)), [part, params, rows]);
  const edited = rows.find((row) => row.key === editing);
  return (
    <Stack gap="sm">
      <ErrorNote error={config.error ?? pending.error} title="The configuration cannot be read" />
      <ErrorNote error={schema.error} title="The description of the configuration cannot be read, so it cannot be changed here" />
      {more.length > 0 && (
        <Group>
          <AddMenu keys={more} onAdd={setEditing} />
        </Group>
      )}
      <DataTable
        withTableBorder
        idAccessor="key"
        records={rows}
        fetching={config.isLoading}
        minHeight={rows.length ? 0 : 120}
        verticalSpacing={4}
        fz="sm"
        onRowDoubleClick={({ record }) => isEditable(params, record.key) && setEditing(record.key)}
        columns={[
          { accessor: 'key', title: 'Name', width: 260, render: (row) => <span title={row.key}>{labelOf(row.key)}</span> },
          { accessor: 'value', title: 'Value', render: (row) => <Value row={row} params={params ?? {}} /> },
          {
            accessor: 'actions',
            title: <span className="atoll-hidden">Actions</span>,
            width: 155,
            render: (row) => (
              <RowActions guest={guest} row={row} params={params ?? {}} digest={config.data?.digest} onEdit={() => setEditing(row.key)} onResize={() => setResizing(row.key)} onMove={() => setMoving(row.key)} />
            ),
          },
        ]}
      />
      {editing === 'boot' && params && (
        <BootDialog guest={guest} devices={rowsOfDevices(config.data ?? {})} value={edited?.pending ?? edited?.value} digest={config.data?.digest} onClose={() => setEditing(null)} />
      )}
      {editing && editing !== 'boot' && params && (
        <KeyDialog guest={guest} keyName={editing} params={params} value={edited?.pending ?? edited?.value} digest={config.data?.digest} onClose={() => setEditing(null)} />
      )}
      {moving && <MoveDialog guest={guest} disk={moving} digest={config.data?.digest} onClose={() => setMoving(null)} />}
      {resizing && <ResizeDialog guest={guest} disk={resizing} digest={config.data?.digest} onClose={() => setResizing(null)} />}
    </Stack>
  );
}
