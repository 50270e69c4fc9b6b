// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Grows a disk. Shrinking is refused by the API, since it would cut off what the guest has written.
import { TextInput } from '@mantine/core';
import { useState } from 'react';

import { call } from '../api/client';
import { guestPath } from '../api/queries';
import type { Guest } from '../api/types';
import { ActionDialog } from '../app/ActionDialog';
import { labelOf } from '../forms/labels';

interface ResizeDialogProps {
  guest: Guest;
  disk: string;
  digest: string | undefined;
  onClose: () => void;
}

export function ResizeDialog({ guest, disk, digest, onClose }: ResizeDialogProps) {
  const [gib, setGib] = useState('');
  const resize = () => call<string | null>('PUT', `${guestPath(guest)}/resize`, { disk, size: `+${gib}G`, digest });
  const valid = /^\d+(\.\d+)?$/.test(gib) && Number(gib) > 0;
  return (
    <ActionDialog title={`Resize ${labelOf(disk)}`} verb="Resize" act={resize} onClose={onClose} valid={valid}>
      {() => <TextInput label="Add (GiB)" inputMode="decimal" data-autofocus value={gib} onChange={(event) => setGib(event.currentTarget.value)} error={gib && !valid ? 'A number above zero is needed.' : undefined} />}
    </ActionDialog>
  );
}
