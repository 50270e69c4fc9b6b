// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
import { expect, it } from 'vitest';

import { moved, places } from './BootDialog';

it('lists the order first, then what is not tried', () => {
  const keys = (value: string | undefined) => places(value, ['ide2', 'net0', 'scsi0']).map(({ key, tried }) => (tried ? key : `-${key}`));
  expect(keys('order=scsi0;gone;net0')).toEqual(['scsi0', 'net0', '-ide2']);
  expect(keys(undefined)).toEqual(['ide2', 'net0', 'scsi0']);
});

it('moves an entry up and down', () => {
  expect(moved(['a', 'b', 'c'], 2, 0)).toEqual(['c', 'a', 'b']);
  expect(moved(['a', 'b', 'c'], 0, 1)).toEqual(['b', 'a', 'c']);
});
