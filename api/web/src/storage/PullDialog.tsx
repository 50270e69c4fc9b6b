// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Has the node pull an OCI image from a registry into a storage, where it is a container template.
import { TextInput } from '@mantine/core';
import { useState } from 'react';

import { call, path } from '../api/client';
import { ActionDialog } from '../app/ActionDialog';

interface PullProps {
  node: string;
  storage: string;
  onClose: () => void;
}

export function PullDialog({ node, storage, onClose }: PullProps) {
  const [reference, setReference] = useState('');
  const [filename, setFilename] = useState('');
  const pull = () => call<string>('POST', path`/nodes/${node}/storage/${storage}/oci-registry-pull`, { reference, ...(filename ? { filename } : {}) });
  return (
    <ActionDialog title={`Pull an image to ${storage}`} verb="Pull" act={pull} onClose={onClose} valid={reference !== ''} size="md">
      {(errors) => (
        <>
          <TextInput
            label="Reference"
            description="registry/repository:tag, or @sha256:… for a digest; without a registry it is Docker's"
            required
            data-autofocus
            value={reference}
            error={errors['reference']}
            onChange={(event) => setReference(event.currentTarget.value)}
          />
          <TextInput label="File name" description="Ends in .tar; the image's own when empty" value={filename} error={errors['filename']} onChange={(event) => setFilename(event.currentTarget.value)} />
        </>
      )}
    </ActionDialog>
  );
}
