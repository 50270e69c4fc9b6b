// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Makes a guest of its own with copies of this one's disks.
import { Button, Group, Modal, Stack, Text, TextInput } from '@mantine/core';
import { useMutation, useQuery } from '@tanstack/react-query';
import { useState, type FormEvent } from 'react';

import { call } from '../api/client';
import { guestPath, refresh } from '../api/queries';
import type { Guest } from '../api/types';
import { ErrorNote } from '../app/ErrorPage';
import { useOpenTask } from '../app/navigation';
import { guestTitle, KIND } from '../lib/guest';
import { watchTask } from '../tasks/watch';

export function CloneDialog({ guest, onClose }: { guest: Guest; onClose: () => void }) {
  const nextId = useQuery({ queryKey: ['/cluster/nextid'], queryFn: () => call<string | number>('GET', '/cluster/nextid'), staleTime: 0, gcTime: 0 });
  const [typed, setTyped] = useState<string | null>(null);
  const [name, setName] = useState('');
  const openTask = useOpenTask();
  const id = typed ?? String(nextId.data ?? '');
  const clone = useMutation({
    mutationFn: () => call<string>('POST', `${guestPath(guest)}/clone`, { newid: id, full: true, ...(name ? { [guest.type === 'qemu' ? 'name' : 'hostname']: name } : {}) }),
    onSuccess: (upid) => {
      void watchTask(upid);
      onClose();
      openTask(upid);
    },
    onSettled: refresh,
  });
  const valid = /^[1-9]\d{2,8}$/.test(id);
  const submit = (event: FormEvent) => {
    event.preventDefault();
    if (valid) clone.mutate();
  };
  return (
    <Modal opened onClose={onClose} title={`Clone ${KIND[guest.type]} ${guestTitle(guest)}`} size="sm">
      <form onSubmit={submit}>
        <Stack gap="sm">
          {guest.status === 'running' && <Text size="sm">The guest stands still while its disks are copied.</Text>}
          <TextInput label="ID of the clone" inputMode="numeric" data-autofocus value={id} onChange={(event) => setTyped(event.currentTarget.value)} error={id && !valid ? 'A number from 100 up is needed.' : undefined} />
          <TextInput label={guest.type === 'qemu' ? 'Name' : 'Host name'} autoComplete="off" value={name} onChange={(event) => setName(event.currentTarget.value)} />
          <ErrorNote error={clone.error ?? nextId.error} />
          <Group justify="flex-end" gap="xs">
            <Button variant="default" onClick={onClose}>
              Cancel
            </Button>
            <Button type="submit" disabled={!valid} loading={clone.isPending}>
              Clone
            </Button>
          </Group>
        </Stack>
      </form>
    </Modal>
  );
}
