// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Moves a disk of a VM, or a volume of a container, to another storage.
import { Button, Checkbox, Group, Modal, Select, Stack, Text } from '@mantine/core';
import { useMutation } from '@tanstack/react-query';
import { useState, type FormEvent } from 'react';

import { call } from '../api/client';
import { guestPath, refresh, useNodeStorages } from '../api/queries';
import type { Guest } from '../api/types';
import { ErrorNote } from '../app/ErrorPage';
import { useOpenTask } from '../app/navigation';
import { labelOf } from '../forms/labels';
import { watchTask } from '../tasks/watch';

interface MoveDialogProps {
  guest: Guest;
  disk: string;
  digest: string | undefined;
  onClose: () => void;
}

/** The image formats that a storage may be asked for; empty is the present one. */
const FORMATS = [
  { value: '', label: 'As it is' },
  { value: 'raw', label: 'raw' },
  { value: 'qcow2', label: 'qcow2' },
];

export function MoveDialog({ guest, disk, digest, onClose }: MoveDialogProps) {
  const isVm = guest.type === 'qemu';
  const storages = useNodeStorages(guest.node);
  const [storage, setStorage] = useState<string | null>(null);
  const [format, setFormat] = useState('');
  const [remove, setRemove] = useState(false);
  const openTask = useOpenTask();
  const move = useMutation({
    mutationFn: () =>
      call<string>('POST', `${guestPath(guest)}/${isVm ? 'move_disk' : 'move_volume'}`, {
        [isVm ? 'disk' : 'volume']: disk,
        ...(storage ? { storage } : {}),
        ...(isVm && format ? { format } : {}),
        delete: remove,
        digest,
      }),
    onSuccess: (upid) => {
      void watchTask(upid);
      onClose();
      openTask(upid);
    },
    onSettled: refresh,
  });
  const content = isVm ? 'images' : 'rootdir';
  const fit = (storages.data ?? []).filter((row) => row.content.split(',').includes(content));
  const valid = storage !== null || (isVm && format !== '');
  const submit = (event: FormEvent) => {
    event.preventDefault();
    if (valid) move.mutate();
  };
  return (
    <Modal opened onClose={onClose} title={`Move ${labelOf(disk)}`} size="sm">
      <form onSubmit={submit}>
        <Stack gap="sm">
          {!isVm && guest.status === 'running' && <Text size="sm">The volume of a running container cannot be moved: stop it first.</Text>}
          <Select label="To storage" data={fit.map((row) => row.storage)} value={storage} onChange={setStorage} clearable={isVm} placeholder={isVm ? 'Where it is' : undefined} data-autofocus />
          {isVm && <Select label="Format" data={FORMATS} value={format} onChange={(value) => setFormat(value ?? '')} allowDeselect={false} />}
          <Checkbox size="xs" label="Remove the old volume afterwards" description="Otherwise it stays with the guest as an unused disk." checked={remove} onChange={(event) => setRemove(event.currentTarget.checked)} />
          <ErrorNote error={move.error ?? storages.error} />
          <Group justify="flex-end" gap="xs">
            <Button variant="default" onClick={onClose}>
              Cancel
            </Button>
            <Button type="submit" disabled={!valid} loading={move.isPending}>
              Move
            </Button>
          </Group>
        </Stack>
      </form>
    </Modal>
  );
}
