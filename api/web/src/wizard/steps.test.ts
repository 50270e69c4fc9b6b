// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
import { expect, it } from 'vitest';

import type { Params } from '../api/schema';
import { toParameters } from '../forms/values';
import { sentValues, WIZARDS } from './steps';

const drive = { type: 'string', format: { file: { type: 'string' } }, default_key: 'file' } as const;
const PARAMS: Params = { 'scsi[n]': drive, 'virtio[n]': drive, 'ide[n]': drive, efidisk0: drive };

/** What is sent of a machine's wizard with these values. */
function sent(values: Record<string, string>) {
  return toParameters(PARAMS, sentValues(WIZARDS.vm, { ...WIZARDS.vm.initial, ...values }));
}

it('boots by firmware from a new disk, with its variables', () => {
  const made = sent({ 'ide2.file': 'local:iso/x.iso', 'scsi0:storage': 'local', 'scsi0.format': 'qcow2', 'efidisk0:storage': 'local' });
  expect(made).toMatchObject({ bios: 'ovmf', efidisk0: 'local:1', scsi0: 'local:8,format=qcow2', ide2: 'local:iso/x.iso,media=cdrom' });
  expect(made['bus']).toBeUndefined();
});

it('copies an image onto the chosen bus', () => {
  const made = sent({ bus: 'virtio', 'scsi0:storage': 'local', 'scsi0.import-from': 'local:import/x.qcow2' });
  expect(made['virtio0']).toBe('local:0,import-from=local:import/x.qcow2');
  expect(made['scsi0']).toBeUndefined();
});

it('asks for no firmware when a kernel boots', () => {
  const made = sent({ kernel: 'local:snippets/k', 'efidisk0:storage': 'local' });
  expect([made['bios'], made['efidisk0'], made['kernel']]).toEqual([undefined, undefined, 'local:snippets/k']);
});
