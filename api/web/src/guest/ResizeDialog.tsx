// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Grows a disk. Shrinking is refused by the API, since it would cut off what the guest has written.
import { Button, Group, Modal, Stack, TextInput } from '@mantine/core';
import { useMutation } from '@tanstack/react-query';
import { useState, type FormEvent } from 'react';

import { call } from '../api/client';
import { guestPath, refresh } from '../api/queries';
import type { Guest } from '../api/types';
import { ErrorNote } from '../app/ErrorPage';
import { useOpenTask } from '../app/navigation';
import { labelOf } from '../forms/labels';

interface ResizeDialogProps {
  guest: Guest;
  disk: string;
  digest: string | undefined;
  onClose: () => void;
}

export function ResizeDialog({ guest, disk, digest, onClose }: ResizeDialogProps) {
  const [gib, setGib] = useState('');
  const openTask = useOpenTask();
  const resize = useMutation({
    mutationFn: () => call<string | null>('PUT', `${guestPath(guest)}/resize`, { disk, size: `+${gib}G`, digest }),
    onSuccess: (upid) => {
      onClose();
      if (upid) openTask(upid);
    },
    onSettled: refresh,
  });
  const valid = /^\d+(\.\d+)?$/.test(gib) && Number(gib) > 0;
  const submit = (event: FormEvent) => {
    event.preventDefault();
    if (valid) resize.mutate();
  };
  return (
    <Modal opened onClose={onClose} title={`Resize ${labelOf(disk)}`} size="sm">
      <form onSubmit={submit}>
        <Stack gap="sm">
          <TextInput label="Add (GiB)" inputMode="decimal" data-autofocus value={gib} onChange={(event) => setGib(event.currentTarget.value)} error={gib && !valid ? 'A number above zero is needed.' : undefined} />
          <ErrorNote error={resize.error} />
          <Group justify="flex-end" gap="xs">
            <Button variant="default" onClick={onClose}>
              Cancel
            </Button>
            <Button type="submit" disabled={!valid} loading={resize.isPending}>
              Resize
            </Button>
          </Group>
        </Stack>
      </form>
    </Modal>
  );
}
