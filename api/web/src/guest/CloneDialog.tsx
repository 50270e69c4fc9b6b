// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Makes a guest of its own with copies of this one's disks.
import { Text, TextInput } from '@mantine/core';
import { useQuery } from '@tanstack/react-query';
import { useState } from 'react';

import { call } from '../api/client';
import { guestPath } from '../api/queries';
import type { Guest } from '../api/types';
import { ActionDialog } from '../app/ActionDialog';
import { guestTitle, KIND } from '../lib/guest';

export function CloneDialog({ guest, onClose }: { guest: Guest; onClose: () => void }) {
  const nextId = useQuery({ queryKey: ['/cluster/nextid'], queryFn: () => call<string | number>('GET', '/cluster/nextid'), staleTime: 0, gcTime: 0 });
  const [typed, setTyped] = useState<string | null>(null);
  const [name, setName] = useState('');
  const id = typed ?? String(nextId.data ?? '');
  const clone = () => call<string>('POST', `${guestPath(guest)}/clone`, { newid: id, full: true, ...(name ? { [guest.type === 'qemu' ? 'name' : 'hostname']: name } : {}) });
  const valid = /^[1-9]\d{2,8}$/.test(id);
  return (
    <ActionDialog title={`Clone ${KIND[guest.type]} ${guestTitle(guest)}`} verb="Clone" act={clone} onClose={onClose} valid={valid} error={nextId.error}>
      {() => (
        <>
          {guest.status === 'running' && <Text size="sm">The guest stands still while its disks are copied.</Text>}
          <TextInput label="ID of the clone" inputMode="numeric" data-autofocus value={id} onChange={(event) => setTyped(event.currentTarget.value)} error={id && !valid ? 'A number from 100 up is needed.' : undefined} />
          <TextInput label={guest.type === 'qemu' ? 'Name' : 'Host name'} autoComplete="off" value={name} onChange={(event) => setName(event.currentTarget.value)} />
        </>
      )}
    </ActionDialog>
  );
}
