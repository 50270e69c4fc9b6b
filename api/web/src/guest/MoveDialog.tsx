// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Moves a disk of a VM, or a volume of a container, to another storage.
import { Checkbox, Select, Text } from '@mantine/core';
import { useState } from 'react';

import { call } from '../api/client';
import { guestPath, useNodeStorages } from '../api/queries';
import type { Guest } from '../api/types';
import { ActionDialog } from '../app/ActionDialog';
import { labelOf } from '../forms/labels';

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
  const move = () =>
    call<string>('POST', `${guestPath(guest)}/${isVm ? 'move_disk' : 'move_volume'}`, {
      [isVm ? 'disk' : 'volume']: disk,
      ...(storage ? { storage } : {}),
      ...(isVm && format ? { format } : {}),
      delete: remove,
      digest,
    });
  const content = isVm ? 'images' : 'rootdir';
  const fit = (storages.data ?? []).filter((row) => row.content.split(',').includes(content));
  const valid = storage !== null || (isVm && format !== '');
  return (
    <ActionDialog title={`Move ${labelOf(disk)}`} verb="Move" act={move} onClose={onClose} valid={valid} error={storages.error}>
      {() => (
        <>
          {!isVm && guest.status === 'running' && <Text size="sm">The volume of a running container cannot be moved: stop it first.</Text>}
          <Select label="To storage" data={fit.map((row) => row.storage)} value={storage} onChange={setStorage} clearable={isVm} placeholder={isVm ? 'Where it is' : undefined} data-autofocus />
          {isVm && <Select label="Format" data={FORMATS} value={format} onChange={(value) => setFormat(value ?? '')} allowDeselect={false} />}
          <Checkbox size="xs" label="Remove the old volume afterwards" description="Otherwise it stays with the guest as an unused disk." checked={remove} onChange={(event) => setRemove(event.currentTarget.checked)} />
        </>
      )}
    </ActionDialog>
  );
}
