// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The buttons that start, stop and delete a guest.
import { Button, Checkbox, Group, Menu, Modal, Stack, Text, TextInput } from '@mantine/core';
import { notifications } from '@mantine/notifications';
import { IconChevronDown, IconCopy, IconDotsVertical, IconMoon, IconPlayerPause, IconPlayerPlay, IconPlayerStop, IconPower, IconRefresh, IconRotate, IconTemplate, IconTrash } from '@tabler/icons-react';
import { useMutation } from '@tanstack/react-query';
import { useNavigate } from '@tanstack/react-router';
import { useState, useSyncExternalStore, type FormEvent } from 'react';

import { call, errorText } from '../api/client';
import { guestPath, refresh, useGuestStatus } from '../api/queries';
import { session } from '../api/session';
import type { Guest } from '../api/types';
import { ActionDialog } from '../app/ActionDialog';
import { ErrorNote } from '../app/ErrorPage';
import { useOpenTask } from '../app/navigation';
import { guestTitle, KIND } from '../lib/guest';
import { watchTask } from '../tasks/watch';
import { CloneDialog } from './CloneDialog';
import { fits, may, POWER_ACTIONS, stateOf, type PowerAction } from './actions';

const ICONS = { start: IconPlayerPlay, shutdown: IconPower, stop: IconPlayerStop, reboot: IconRefresh, reset: IconRotate, suspend: IconPlayerPause, hibernate: IconMoon, resume: IconPlayerPlay } as const;
const FRONT = ['start', 'resume', 'shutdown'];

function usePower(guest: Guest) {
  return useMutation({
    mutationFn: (action: PowerAction) => call<string>('POST', `${guestPath(guest)}/status/${action.call ?? action.name}`, action.params),
    onSuccess: (upid) => void watchTask(upid),
    onError: (error, action) =>
      notifications.show({ color: 'red', title: `${action.label}: ${guestTitle(guest)}`, message: errorText(error), autoClose: false, closeButtonProps: { 'aria-label': 'Dismiss' } }),
    onSettled: refresh,
  });
}

interface DeleteProps {
  guest: Guest;
  opened: boolean;
  onClose: () => void;
}

function DeleteDialog({ guest, opened, onClose }: DeleteProps) {
  const navigate = useNavigate();
  const [typed, setTyped] = useState('');
  const [purge, setPurge] = useState(true);
  const remove = useMutation({
    mutationFn: () => call<string>('DELETE', guestPath(guest), { purge }),
    onSuccess: async (upid) => {
      void watchTask(upid);
      onClose();
      await navigate({ to: '/nodes/$node', params: { node: guest.node } });
      await refresh();
    },
  });
  const matches = typed.trim() === String(guest.vmid);
  const submit = (event: FormEvent) => {
    event.preventDefault();
    if (matches) remove.mutate();
  };
  return (
    <Modal opened={opened} onClose={onClose} title={`Delete ${KIND[guest.type]} ${guestTitle(guest)}`}>
      <form onSubmit={submit}>
        <Stack gap="sm">
          <Text size="sm">The guest, its configuration and its disks are removed. This cannot be undone.</Text>
          <TextInput label={`Type ${guest.vmid} to confirm`} data-autofocus autoComplete="off" value={typed} onChange={(event) => setTyped(event.currentTarget.value)} />
          <Checkbox size="xs" label="Also remove it from jobs and permissions" checked={purge} onChange={(event) => setPurge(event.currentTarget.checked)} />
          <ErrorNote error={remove.error} />
          <Group justify="flex-end" gap="xs">
            <Button variant="default" onClick={onClose}>
              Cancel
            </Button>
            <Button type="submit" color="red" disabled={!matches} loading={remove.isPending}>
              Delete
            </Button>
          </Group>
        </Stack>
      </form>
    </Modal>
  );
}

function ConfirmDialog({ guest, action, onClose, onConfirm }: { guest: Guest; action: PowerAction | null; onClose: () => void; onConfirm: (action: PowerAction) => void }) {
  return (
    <Modal opened={action !== null} onClose={onClose} title={`${action?.label ?? ''}: ${KIND[guest.type]} ${guestTitle(guest)}`} size="sm">
      <Text size="sm" mb="md">
        {action?.confirm}
      </Text>
      <Group justify="flex-end" gap="xs">
        <Button variant="default" onClick={onClose}>
          Cancel
        </Button>
        <Button data-autofocus color={action?.name === 'stop' || action?.name === 'reset' ? 'red' : 'lagoon'} onClick={() => action && onConfirm(action)}>
          {action?.label}
        </Button>
      </Group>
    </Modal>
  );
}

function TemplateDialog({ guest, onClose }: { guest: Guest; onClose: () => void }) {
  const convert = () => call<string>('POST', `${guestPath(guest)}/template`);
  return (
    <ActionDialog title={`Make ${guestTitle(guest)} a template`} verb="Make template" act={convert} onClose={onClose} isQuestion>
      {() => <Text size="sm">A template is there to be cloned and cannot be started. There is no way back but a clone.</Text>}
    </ActionDialog>
  );
}

export function GuestActions({ guest }: { guest: Guest }) {
  const status = useGuestStatus(guest);
  const user = useSyncExternalStore(session.subscribe, session.snapshot);
  const power = usePower(guest);
  const openTask = useOpenTask();
  const [asked, setAsked] = useState<PowerAction | null>(null);
  const [deleting, setDeleting] = useState(false);
  const [cloning, setCloning] = useState(false);
  const [converting, setConverting] = useState(false);
  const current: Guest = { ...guest, ...(status.data ? { status: status.data.status } : {}) };
  const state = stateOf(current, status.data?.qmpstatus);
  const run = (action: PowerAction) => {
    setAsked(null);
    power.mutate(action);
  };
  const choose = (action: PowerAction) => (action.confirm ? setAsked(action) : run(action));
  const mayPower = may(user, 'VM.PowerMgmt');
  const front = POWER_ACTIONS.filter((action) => FRONT.includes(action.name) && (action.name !== 'resume' || fits(action, current, state)));
  const more = POWER_ACTIONS.filter((action) => !FRONT.includes(action.name) && (action.only === undefined || action.only === guest.type));
  return (
    <Group gap={6}>
      {front.map((action) => {
        const Icon = ICONS[action.name];
        return (
          <Button
            key={action.name}
            variant="default"
            leftSection={<Icon size={14} aria-hidden />}
            disabled={!mayPower || !fits(action, current, state)}
            loading={power.isPending && power.variables.name === action.name}
            onClick={() => choose(action)}
          >
            {action.label}
          </Button>
        );
      })}
      <Menu position="bottom-end" withinPortal>
        <Menu.Target>
          <Button variant="default" leftSection={<IconDotsVertical size={14} aria-hidden />} rightSection={<IconChevronDown size={13} aria-hidden />}>
            More
          </Button>
        </Menu.Target>
        <Menu.Dropdown>
          {more.map((action) => {
            const Icon = ICONS[action.name];
            return (
              <Menu.Item key={action.name} leftSection={<Icon size={15} aria-hidden />} disabled={!mayPower || !fits(action, current, state)} onClick={() => choose(action)}>
                {action.label}
              </Menu.Item>
            );
          })}
          <Menu.Divider />
          <Menu.Item leftSection={<IconCopy size={15} aria-hidden />} disabled={!may(user, 'VM.Clone')} onClick={() => setCloning(true)}>
            Clone…
          </Menu.Item>
          <Menu.Item leftSection={<IconTemplate size={15} aria-hidden />} disabled={!may(user, 'VM.Allocate') || state !== 'stopped' || Boolean(guest.template)} onClick={() => setConverting(true)}>
            Make template…
          </Menu.Item>
          <Menu.Item color="red" leftSection={<IconTrash size={15} aria-hidden />} disabled={!may(user, 'VM.Allocate') || state !== 'stopped'} onClick={() => setDeleting(true)}>
            Delete…
          </Menu.Item>
          {power.data && <Menu.Item onClick={() => openTask(power.data)}>Log of the last action</Menu.Item>}
        </Menu.Dropdown>
      </Menu>
      <ConfirmDialog guest={guest} action={asked} onClose={() => setAsked(null)} onConfirm={run} />
      {cloning && <CloneDialog guest={guest} onClose={() => setCloning(false)} />}
      {converting && <TemplateDialog guest={guest} onClose={() => setConverting(false)} />}
      {deleting && <DeleteDialog guest={guest} opened onClose={() => setDeleting(false)} />}
    </Group>
  );
}
